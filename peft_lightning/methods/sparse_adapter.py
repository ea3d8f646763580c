"""SparseAdapter (He et al., 2022, arXiv:2210.04284): adapters pruned at initialisation.

Algorithm 1 with symbol = variable: initialise w; scores z = score(w) (functional/saliency); the share s = ``sparsity``
with the lowest scores is removed, m = mask (functional/sparsify); train w~ = m * w (layers/bottleneck).

Placement so far: Houlsby's, two adapters per transformer layer. Deviations, each for a reason:

* exact counts with seeded ties instead of a percentile that keeps or drops ties together;
* scores in fp32, SNIP from the gradient of the mean loss over ``score_batches`` batches in eval mode (the released
  code's fp16 products can underflow), and those gradients do not leak into the first step;
* the classifier trains and is never pruned (the released scripts freeze it at its random start);
* ``sparsity`` means the share removed, as in the paper (the released option of that name is the share kept).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.backbones.families import family_of
from peft_lightning.errors import UsageError
from peft_lightning.functional.saliency import magnitude, snip
from peft_lightning.functional.sparsify import kept_count, top_masks
from peft_lightning.layers.bottleneck import Bottleneck, MaskedLinear
from peft_lightning.layers.inject import inject, select_sites
from peft_lightning.settings import OptimConfig, as_config
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.table import Task

__all__ = ["AdapterConfig", "PruneConfig", "SparseAdapterModule"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Shape and place of the adapters.

    Attributes:
        bottleneck: r, the inner width.
        nonlinearity: relu, gelu, tanh, silu or identity.
        scaling: factor of the adapter's output.
        init_std: standard deviation of both matrices at initialisation.
        target: regular expression over the blocks' paths; adapters go where it is found.
        name: the adapter's name inside the backbone.

    Raises:
        UsageError: if a value is not allowed.
    """

    bottleneck: int = 64
    nonlinearity: str = "relu"
    scaling: float = 1.0
    init_std: float = 0.02
    target: str = ".*"
    name: str = "sparse"

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise UsageError(f"adapter.bottleneck = {self.bottleneck}: must be at least 1")
        if not self.init_std >= 0:
            raise UsageError(f"adapter.init_std = {self.init_std}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What is removed before training.

    Attributes:
        sparsity: s, the share of the adapters' weights that is removed; 0 gives the dense adapter.
        score: snip or magnitude.
        scope: global ranks all adapters' weights together, tensor ranks inside each matrix.
        score_batches: batches of training data that a score with gradients looks at.

    Raises:
        UsageError: if a value is not allowed.
    """

    sparsity: float = 0.4
    score: str = "snip"
    scope: str = "global"
    score_batches: int = 10

    def __post_init__(self) -> None:
        kept_count(1, self.sparsity)
        if self.score not in ("snip", "magnitude"):
            raise UsageError(f"prune.score = {self.score!r}: must be snip or magnitude")
        if self.scope not in ("global", "tensor"):
            raise UsageError(f"prune.scope = {self.scope!r}: must be global or tensor")
        if self.score_batches < 1:
            raise UsageError(f"prune.score_batches = {self.score_batches}: must be at least 1")


class SparseAdapterModule(TaskModule):
    """Trains Houlsby adapters, pruned before the first step, and the task's head; the backbone is frozen.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        adapter: shape and place of the adapters.
        prune: what is removed before training.
        optim: the optimiser's settings.
        head: ``dense`` (dense-tanh-linear on the first token) or ``linear``.
        head_dropout: dropout in the head.
        class_weights: one weight per class in the loss.
        max_length: tokens at most in ``predict``.
        seed: of initial values, dropout and ties.

    Raises:
        UsageError: if a value is not allowed.
    """

    def __init__(
        self,
        task: str | Task,
        backbone: str | BackboneConfig,
        adapter: AdapterConfig = AdapterConfig(),
        prune: PruneConfig = PruneConfig(),
        optim: OptimConfig = OptimConfig(lr=1e-3),
        head: str = "dense",
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
        """Hook one adapter after the attention block and one after the feed-forward block of every layer."""
        config: Any = self.backbone.config
        family = family_of(config.model_type)
        layers = [family.layer.format(i=i) for i in range(config.num_hidden_layers)]
        blocks = [f"{layer}.{end}" for layer in layers for end in (family.attention_output, family.ffn_output)]

        def build() -> Bottleneck:
            return Bottleneck(
                config.hidden_size,
                self.adapter.bottleneck,
                nonlinearity=self.adapter.nonlinearity,
                scaling=self.adapter.scaling,
                init_std=self.adapter.init_std,
                masked=self.prune.sparsity > 0,
            )

        sites = select_sites(blocks, self.adapter.target)
        self.adapters = inject(self.backbone, sites, family.tail, self.adapter.name, build).adapters

    def declared(self) -> Iterator[nn.Module]:
        """Adapters and head."""
        yield from self.adapters.values()
        yield self.head

    def prunable(self) -> dict[str, MaskedLinear]:
        """The adapters' linear layers by name; masks remove weights of these, never biases."""
        return {
            f"{site}.{name}": linear
            for site, adapter in self.adapters.items()
            for name, linear in adapter.prunable().items()
        }

    def summary(self) -> dict[str, Any]:
        """Adds how many of the adapters' weights were kept."""
        layers = self.prunable().values()
        total = sum(layer.weight.numel() for layer in layers)
        kept = sum(layer.weight.numel() if layer.mask is None else int(layer.mask.sum()) for layer in layers)
        base = super().summary()
        trained = base["trained_parameters"] - (total - kept)
        return {
            **base,
            "trained_parameters": trained,
            "adapter_parameters": trained - base["head_parameters"],
            "prunable_weights": total,
            "kept_weights": kept,
            "kept_share": kept / total,
            "score": self.prune.score if self.prune.sparsity else None,
            "kept_share_by_matrix": {
                name: float(layer.mask.float().mean())
                for name, layer in self.prunable().items()
                if layer.mask is not None
            },
        }

    fixed_by_file = (*TaskModule.fixed_by_file, "prune", "adapter.init_std")

    # -- pruning at initialisation ---------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Score and prune, unless a checkpoint brought the masks."""
        super().on_train_start()
        if self.prune.sparsity == 0 or self._pruned:
            return
        self.install_masks(self._scoring_batches() if self.prune.score == "snip" else ())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds masks that were made before its first step."""
        super().on_load_checkpoint(checkpoint)
        self._pruned = True

    def install_masks(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Score all prunable weights, mask the lowest, and make all ranks agree with rank 0.

        Args:
            batches: training batches on the module's device; used by ``snip`` only.
        """
        weights = {name: layer.weight for name, layer in self.prunable().items()}
        if self.prune.score == "magnitude":
            scores = {name: magnitude(weight) for name, weight in weights.items()}
        else:
            gradients = self._mean_gradients(weights, batches)
            scores = {name: snip(weights[name], gradients[name]) for name in weights}
        masks = top_masks(scores, self.prune.sparsity, scope=self.prune.scope, seed=self.seed)
        for name, layer in self.prunable().items():
            mask = masks[name]
            if self._trainer is not None:
                mask = self.trainer.strategy.broadcast(mask.cpu(), src=0)
            layer.set_mask(mask.to(layer.weight.device))
        self._pruned = True

    def _scoring_batches(self) -> Iterator[Mapping[str, Any]]:
        """The first batches of a fresh pass over the training data, on the module's device."""
        loader = self.trainer.fit_loop._data_source.dataloader()
        for batch in islice(loader, self.prune.score_batches):
            yield self.trainer.strategy.batch_to_device(batch, self.device)

    def _mean_gradients(self, weights: Mapping[str, Tensor], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """fp32 gradients of the mean loss over all batches of all ranks, in eval mode; no ``.grad`` is touched."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        total_weight = torch.zeros((), device=self.device)
        for batch in batches:
            with torch.enable_grad():
                loss, weight = self.batch_loss(batch)
                gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += gradient.float()
            total_weight += weight.detach()
        for module, mode in modes.items():
            module.training = mode
        if self._trainer is not None:
            sums = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in sums.items()}
            total_weight = self.trainer.strategy.reduce(total_weight, reduce_op="sum")
        if not total_weight > 0:
            raise UsageError("prune.score = 'snip': there is no training batch to score on; or use magnitude")
        return {name: value / total_weight for name, value in sums.items()}
