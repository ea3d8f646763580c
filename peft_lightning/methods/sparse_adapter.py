"""SparseAdapter (He et al., 2022, arXiv:2210.04284): adapters pruned at initialisation.

Algorithm 1 with symbol = variable: initialise w; scores z = score(w) (functional/saliency); the share s = ``sparsity``
with the lowest scores is removed, m = mask (functional/sparsify); train w~ = m * w (layers/masked). Adapters and where
they go: layers/adapters. Large-Sparse (section 3.1): ``multiplier`` times the bottleneck with as many trained
parameters as the dense adapter. Deviations, each for a reason:

* exact counts with seeded ties instead of a percentile that keeps or drops ties together;
* scores in fp32, from the gradient of the mean loss over ``score_batches`` batches in eval mode (the released code's
  fp16 products can underflow), and those gradients do not leak into the first step;
* scores that rank nothing are an error: with LoRA's B = 0 the released code prunes nothing, or all of B, in silence.
  ``score_init`` says what is scored instead; the weights that are trained start as ever;
* the classifier trains and is never pruned (the released scripts freeze it at its random start);
* ``sparsity`` means the share removed, as in the paper (the released option of that name is the share kept);
* Large-Sparse counts the biases too, so the budget is the dense adapter's to the parameter, not 1 / multiplier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.checks import check_types
from peft_lightning.errors import UsageError
from peft_lightning.functional.gradients import hessian_gradient, mean_gradients
from peft_lightning.functional.saliency import fill_zeros_, grasp, magnitude, random_scores, snip
from peft_lightning.functional.sparsify import erdos_renyi_counts, kept_count, top_masks
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.masked import MaskedParameter, prunable
from peft_lightning.layers.still import held_still
from peft_lightning.scoring import first_batches, over_ranks, warm_up
from peft_lightning.settings import OptimConfig, as_config
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.table import Task

__all__ = ["PruneConfig", "SparseAdapterModule"]

_SCORES = ("random", "magnitude", "er", "snip", "grasp", "given")
_SPARSITY = 0.4


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is removed before training.

    Attributes:
        sparsity: s, the share of the adapters' weights that is removed; 0 gives the dense adapter. None: the paper's
            0.4, or with a multiplier what it implies.
        score: random, magnitude, er (Erdos-Renyi: random in each matrix, larger ones sparser), snip, grasp, or given
            (masks that came with a file).
        scope: global ranks all adapters' weights together, tensor ranks inside each matrix; er decides this itself.
        score_batches: batches of training data that a score with gradients looks at, in a pass of its own (data that
            can be gone through only once is used up by them).
        score_init: the weights that are scored: as_is, surrogate (matrices that start from zero get random values
            while they are scored) or warmup (those after some steps on the scoring batches). Training starts from the
            initial values in any case; random and er look at no weights.
        warmup_steps: number of these steps, with the optimiser's learning rate.
        multiplier: Large-Sparse: the bottleneck's factor, 1 to 4; above 1 the sparsity follows from it.

    Raises:
        UsageError: if a value is not allowed.
    """

    sparsity: float | None = None
    score: str = "snip"
    scope: str = "global"
    score_batches: int = 10
    score_init: str = "surrogate"
    warmup_steps: int = 10
    multiplier: int = 1

    def __post_init__(self) -> None:
        check_types(self, "prune")
        for name, allowed in (
            ("score", _SCORES),
            ("scope", ("global", "tensor")),
            ("score_init", ("as_is", "surrogate", "warmup")),
            ("multiplier", (1, 2, 3, 4)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"prune.{name} = {value!r}: must be {', '.join(map(str, allowed))}")
        for name in ("score_batches", "warmup_steps"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"prune.{name} = {value}: must be at least 1")
        if self.sparsity is not None:
            kept_count(1, self.sparsity)
            if self.multiplier > 1:
                raise UsageError(
                    f"prune.sparsity = {self.sparsity}: follows from prune.multiplier = {self.multiplier}; leave it out"
                )

    def budgets(self, parameters: Mapping[str, MaskedParameter]) -> dict[str, int]:
        """Weights to keep of each tensor, if each is ranked alone; their sum is the number kept in all.

        With a multiplier k a tensor of n weights keeps n / k less the biases that its k times wider side has more.
        """
        total = {name: parameter.weight.numel() for name, parameter in parameters.items()}
        if self.multiplier == 1:
            return {name: kept_count(n, self.share) for name, n in total.items()}
        more = {name: p.module.inner_unmasked * (self.multiplier - 1) for name, p in parameters.items()}
        return {name: (n - more[name]) // self.multiplier for name, n in total.items()}

    @property
    def share(self) -> float:
        """The sparsity in force without a multiplier."""
        return _SPARSITY if self.sparsity is None else self.sparsity

    @property
    def active(self) -> bool:
        """Whether anything is removed."""
        return self.sparsity != 0


class SparseAdapterModule(TaskModule):
    """Trains adapters, pruned before the first step, and the task's head; the backbone is frozen.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        adapter: kind, shape and place of the adapters.
        prune: what is removed before training.
        optim: the optimiser's settings.
        head: ``dense`` (dense, tanh, linear), ``linear``, or ``auto``: dense on the token that stands for a text,
            linear on every token.
        head_dropout: dropout in the head.
        class_weights: one weight per class in the loss.
        max_length: tokens at most in ``predict``.
        seed: of initial values, dropout and ties.

    Raises:
        UsageError: if a value is not allowed.
    """

    fixed_by_file = (*TaskModule.fixed_by_file, "prune", "adapter")

    def __init__(
        self,
        task: str | Task,
        backbone: str | BackboneConfig,
        adapter: AdapterConfig = AdapterConfig(),
        prune: PruneConfig = PruneConfig(),
        optim: OptimConfig = OptimConfig(lr=1e-3),
        head: str = "auto",
        head_dropout: float = 0.1,
        class_weights: Sequence[float] | None = None,
        max_length: int = 128,
        seed: int = 42,
    ) -> None:
        super().__init__(
            task=task,
            backbone=backbone,
            optim=optim,
            head=head,
            head_dropout=head_dropout,
            class_weights=class_weights,
            max_length=max_length,
            seed=seed,
        )
        self.adapter = as_config(AdapterConfig, adapter)
        self.prune = as_config(PruneConfig, prune)
        self.record(adapter=self.adapter, prune=self.prune)
        self._pruned = False

    def attach(self) -> None:
        """Hook the adapters on the backbone."""
        self.adapters = attach_adapters(
            self.backbone, self.adapter, masked=self.prune.active, multiplier=self.prune.multiplier
        )

    def declared(self) -> Iterator[nn.Module]:
        """Adapters and head."""
        yield from self.adapters.values()
        yield self.head

    def prunable(self) -> dict[str, MaskedParameter]:
        """What masks may remove weights of (never biases), by the tensor's name inside the backbone."""
        return {
            f"{path}.{name}": parameter
            for path, adapter in self.adapters.items()
            for name, parameter in prunable(adapter).items()
        }

    def summary(self) -> dict[str, Any]:
        """Adds which adapters there are, and how many of their weights were kept."""
        parameters = self.prunable()
        total = sum(p.weight.numel() for p in parameters.values())
        shares = {name: float(p.mask.float().mean()) for name, p in parameters.items() if p.mask is not None}
        kept = sum(p.weight.numel() if p.mask is None else int(p.mask.sum()) for p in parameters.values())
        base = super().summary()
        trained = base["trained_parameters"] - (total - kept)
        return {
            **base,
            "trained_parameters": trained,
            "adapter_parameters": trained - base["head_parameters"],
            "prunable_weights": total,
            "kept_weights": kept,
            "kept_share": kept / total,
            "score": self.prune.score if self.prune.active else None,
            "kept_share_by_matrix": shares,
            "adapters": {"kind": self.adapter.kind, "sites": list(self.adapters)},
        }

    def lines(self) -> dict[str, str]:
        """The adapters, and what is left of their weights."""
        facts = self.summary()
        kept, total = facts["kept_weights"], facts["prunable_weights"]
        share = f"{kept / total:.4f} ({kept:,} of {total:,})" if kept < total else f"1 (dense, {total:,} weights)"
        return {"adapters": f"{self.adapter.kind}, {len(self.adapters)} places", "kept share": share}

    # -- pruning at initialisation ---------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Score and prune, unless a checkpoint brought the masks."""
        super().on_train_start()
        if not self.prune.active or self._pruned:
            return
        warm = self.prune.score_init == "warmup" and self.prune.score == "magnitude"
        needs_data = warm or self.prune.score in ("snip", "grasp")
        with torch.random.fork_rng():  # a user's own loader may shuffle by the global state
            self.install_masks(first_batches(self, self.prune.score_batches) if needs_data else ())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of a run holds masks; one that was written before the run has everything kept."""
        super().on_load_checkpoint(checkpoint)
        masks = [tensor for name, tensor in checkpoint["state_dict"].items() if name.endswith("_mask")]
        self._pruned = not all(mask.all() for mask in masks)

    def install_masks(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Score all prunable weights, mask the lowest, and make all ranks agree with rank 0.

        Args:
            batches: training batches on the module's device; random, magnitude and er need none.

        Raises:
            UsageError: if the score needs a batch and there is none.
            DegenerateScoreError: if the scores rank nothing, or would leave a tensor empty.
        """
        parameters = self.prunable()
        with held_still(self):
            scores = self._scores(parameters, list(batches))
        masks = top_masks(scores, self._kept(parameters), seed=self.seed)
        for name, parameter in parameters.items():
            mask = masks[name]
            if self._trainer is not None:
                mask = self.trainer.strategy.broadcast(mask.cpu(), src=0)
            parameter.set_mask(mask.to(parameter.weight.device))
        self._pruned = True

    def _kept(self, parameters: Mapping[str, MaskedParameter]) -> int | dict[str, int]:
        """How many weights stay: of each tensor, or in all where they are ranked together."""
        each = self.prune.budgets(parameters)
        if self.prune.score != "er" and self.prune.scope == "tensor":
            return each
        shapes = {name: tuple(p.weight.shape) for name, p in parameters.items()}
        total = sum(p.weight.numel() for p in parameters.values())
        in_all = sum(each.values()) if self.prune.multiplier > 1 else kept_count(total, self.prune.share)
        return erdos_renyi_counts(shapes, in_all) if self.prune.score == "er" else in_all

    def _scores(self, parameters: Mapping[str, MaskedParameter], batches: Sequence[Any]) -> dict[str, Tensor]:
        if self.prune.score == "given":
            raise UsageError("prune.score = 'given': masks that come with a file, and there are none; name a score")
        weights: dict[str, Tensor] = {name: parameter.weight for name, parameter in parameters.items()}
        if self.prune.score in ("random", "er"):
            return random_scores(weights, self.seed)
        if self.prune.score_init == "surrogate":
            fill_zeros_(weights, self.adapter.init_std, self.seed)
        elif self.prune.score_init == "warmup":
            option = "prune.score_init = 'warmup'"
            warm_up(self, self.trainable_parameters(), self.batch_loss, batches, self.prune.warmup_steps, option)
        if self.prune.score == "magnitude":
            return {name: magnitude(weight) for name, weight in weights.items()}
        if self.prune.score == "snip":
            gradients = mean_gradients(self.batch_loss, weights, batches, partial(over_ranks, self))
            return {name: snip(weights[name], gradients[name]) for name in weights}
        products = hessian_gradient(self.batch_loss, weights, batches, partial(over_ranks, self))
        return {name: grasp(weights[name], products[name]) for name in weights}
