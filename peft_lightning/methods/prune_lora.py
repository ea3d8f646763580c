"""Prune-LoRA (Wang, Yang and Sun, 2023, arXiv:2303.14704): heads pruned by their importance to the task, then LoRA
whose rank follows the importance of the block.

Section 3.1: importance of the heads (equations 1 and 2: functional/heads, measured in layers/importance). Section 3.2:
the least important go. Section 3.3, equation 5: h = W' x + B' A' x on query, key, value and output, with W' the pruned
weights and a higher rank where the block matters more (functional/structure). LayerNorms and classifier train too
(4.1.2). Deviations, each for a reason:

* heads are removed, not masked (layers/pruned_heads); the paper's masks made inference slower, as it says in section 5;
* neurons of the feed-forward blocks can go as well, its future work, and a budget can decide how many of each;
* 44 of 144 heads is the default as a share, so that smaller models lose the same part;
* each attention keeps a head unless ``min_heads_per_layer`` is 0;
* it does not say what a block's importance is: the mean of its heads' final importance by default, which with the norm
  per layer says how evenly they matter; the other choices of ``importance.blocks`` say how much;
* it gives no LoRA factor: here c = alpha / r is 1 at every rank;
* its parameter counts (101.29 M, 308.7 K trained) come from no setting of its text: with 44 heads gone and as much
  LoRA as it counts 101.09 M are left, and ranks 8 and 4 on four maps need 303,104 at least, before the LayerNorms'
  38,400. We follow the text.

The decisions are made once, before the optimiser exists, and every file carries them (layers/plan).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.errors import CheckpointError, PeftLightningError, UsageError
from peft_lightning.files.importance import importance_of, plain_importance, read_importance
from peft_lightning.files.manifest import MANIFEST_KEY
from peft_lightning.layers.importance import Importance, measure_importance
from peft_lightning.layers.left import left_lines, left_of, whole_of
from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.norms import backbone_norms, train_in_float32
from peft_lightning.layers.plan import PrunePlan, apply_plan
from peft_lightning.layers.planning import decide_plan, final_importance, needs_importance
from peft_lightning.layers.prune_config import ImportanceConfig, RankConfig, StructureConfig
from peft_lightning.layers.still import held_still
from peft_lightning.scoring import first_batches, over_ranks, teach_head
from peft_lightning.seeding import seeded_on_cpu, step_seed
from peft_lightning.settings import OptimConfig, as_config
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.table import Task

__all__ = ["PruneLoRAModule"]


class PruneLoRAModule(TaskModule):
    """Prunes heads (and neurons) by importance before the first step, then trains LoRA, norms and head.

    Until a fit has measured the importance, or a file brought the decisions, the backbone is whole and without LoRA.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        importance: how the importance is measured.
        prune: what goes.
        lora: ranks and scaling.
        train_norms: whether the backbone's norms train.
        optim: the optimiser's settings.
        head: ``dense`` (dense, tanh, linear), ``linear``, or ``auto``: dense on the token that stands for a text,
            linear on every token.
        head_dropout: dropout in the head.
        class_weights: one weight per class in the loss.
        max_length: tokens at most in ``predict``.
        seed: of initial values, dropout and random orders.

    Raises:
        UsageError: if a value is not allowed.
    """

    fixed_by_file = (*TaskModule.fixed_by_file, "importance", "prune", "lora", "train_norms")

    def __init__(
        self,
        task: str | Task,
        backbone: str | BackboneConfig,
        importance: ImportanceConfig = ImportanceConfig(),
        prune: StructureConfig = StructureConfig(),
        lora: RankConfig = RankConfig(),
        train_norms: bool = True,
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
        self.importance = as_config(ImportanceConfig, importance)
        self.prune, self.lora = as_config(StructureConfig, prune), as_config(RankConfig, lora)
        self.train_norms = train_norms
        self.record(importance=self.importance, prune=self.prune, lora=self.lora, train_norms=train_norms)
        self.plan: PrunePlan | None = None
        self.measured: Importance | None = None
        self.loras: dict[str, LoRA] = {}
        self._given: PrunePlan | None = None
        self._refusal: PeftLightningError | None = None

    # -- construction ----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Find the norms that train; LoRA comes when the decisions are made."""
        self.norms = backbone_norms(self.backbone) if self.train_norms else {}
        for norm in self.norms.values():
            train_in_float32(norm)
        self.whole = whole_of(self.backbone, self.prune.target_tokens)

    def declared(self) -> Iterator[nn.Module]:
        """LoRA, norms and head."""
        yield from self.loras.values()
        yield from self.norms.values()
        yield self.head

    def configure_model(self) -> None:
        """Build the whole model; prune it and attach LoRA as soon as it can be decided what goes.

        Raises:
            UsageError: if what is asked for does not fit the backbone; nothing is pruned then.
            CheckpointError: if decisions in a file do not fit it.
        """
        super().configure_model()
        if self.plan is not None:
            return
        if self._given is not None:
            try:
                self.install(self._given)
            except UsageError as error:
                raise CheckpointError(f"checkpoint: {error}") from None
        elif (plan := self._decide()) is not None:
            self.install(plan)

    def install(self, plan: PrunePlan) -> None:
        """Prune the whole backbone and attach LoRA.

        Raises:
            UsageError: if the plan does not fit the backbone; nothing is pruned then.
        """
        with seeded_on_cpu(step_seed(self.seed, 1)):
            self.loras = apply_plan(self.backbone, plan, self.lora)
        self.plan = plan
        self.train_declared()

    # -- decisions -------------------------------------------------------------------------------------------

    def measure(self, batches: Sequence[Mapping[str, Any]]) -> Importance:
        """Importance of the whole backbone's heads, and of what else the settings ask for.

        Args:
            batches: of training data, on the module's device.

        Raises:
            UsageError: if there is none.
        """
        with held_still(self):
            if self.importance.classifier_steps:
                teach_head(self, batches, self.importance.classifier_steps, "importance.classifier_steps")
            return measure_importance(
                self.backbone,
                self.batch_loss,
                batches,
                reduce=partial(over_ranks, self),
                neurons=self.prune.takes_neurons and self.prune.order == "importance",
                blocks=self.importance.blocks == "gate",
            )

    def _decide(self) -> PrunePlan | None:
        """The decisions, if they can be made now; all ranks get those of rank 0."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        with seeded_on_cpu(step_seed(self.seed, 2)):  # a user's own loader may shuffle by the global state
            if needs_importance(self.prune, self.lora):
                if self.importance.file is not None:
                    return self._decide_by_file()
                if not fitting:
                    return None
                self.to(self.trainer.strategy.root_device)
                self.measured = self.measure(list(first_batches(self, self.importance.batches)))
            plan = self._planned()
        return PrunePlan.of(self.trainer.strategy.broadcast(plan.plain()), "rank 0") if fitting else plan

    def _decide_by_file(self) -> PrunePlan | None:
        """The same from a file. One that cannot be used is refused when a fit begins: a checkpoint may come first."""
        try:
            self.measured = read_importance(str(self.importance.file), self.backbone_fingerprint, self.task.name)
            return self._planned()
        except PeftLightningError as error:
            self._refusal = error
            return None

    def _planned(self) -> PrunePlan:
        choices: dict[str, Any] = {"settings": self.importance, "prune": self.prune, "lora": self.lora}
        return decide_plan(self.backbone, self.measured, **choices, seed=self.seed)

    # -- files -----------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Adds the decisions, and the importance that they follow."""
        plan = None if self.plan is None else self.plan.plain()
        measured = None if self.measured is None else plain_importance(replace(self.measured, neurons={}))
        return {**super().manifest(), "plan": plan, "importance": measured}

    def before_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the decisions out of a file. Called before the data is read, nothing is measured again.

        Raises:
            CheckpointError: if they are missing or malformed.
        """
        manifest = checkpoint.get(MANIFEST_KEY)
        if not isinstance(manifest, dict):
            raise CheckpointError("checkpoint: was not written by peft_lightning (it has no manifest)")
        plan = PrunePlan.of(manifest.get("plan"), "checkpoint")
        importance = manifest.get("importance")
        if self.plan not in (None, plan) or any(lora.merged for lora in self.loras.values()):
            self._built, self.plan, self.loras = False, None, {}  # what is there was cut otherwise, or is merged
        self._given = plan
        self.measured = None if importance is None else importance_of(importance, "checkpoint")
        if self.measured is not None and {p: len(s) for p, s in self.measured.heads.items()} != dict(plan.units):
            raise CheckpointError("checkpoint: damaged (its importance is not that of the heads in its plan)")

    # -- use -------------------------------------------------------------------------------------------------

    def merge(self) -> PruneLoRAModule:
        """Fold every B A into its weights, in place, for inference as fast as the pruned backbone's.

        Merging twice equals merging once; the module comes back. Files still hold A and B apart. A backbone held in
        bfloat16 rounds the sums.

        Raises:
            UsageError: if nothing was decided yet.
        """
        self.configure_model()
        if self.plan is None:
            raise self._refusal or UsageError("merge: what goes is not decided; fit first, or give importance.file")
        for path, lora in self.loras.items():
            lora.merge(cast(nn.Linear, self.backbone.get_submodule(path.partition(".loras.")[0])))
        return self

    def on_fit_start(self) -> None:
        """Check the data, and that the weights are those that LoRA is added to.

        Raises:
            UsageError: if the module is merged.
        """
        super().on_fit_start()
        if self.plan is None and self._refusal is not None:
            raise self._refusal
        if any(lora.merged for lora in self.loras.values()):
            raise UsageError("this module is merged and cannot train on; load its checkpoint again")

    def summary(self) -> dict[str, Any]:
        """Adds what is left of the backbone, the ranks, and the heads' importance where it was measured."""
        base = super().summary()
        if self.plan is None:
            return base
        left = left_of(self.backbone, self.plan, self.whole)
        return {
            **base,
            "kept_share": left["parameters_share"],
            "parameters_left": left["parameters"],
            "structure": left,
            "heads_kept": {path: list(kept) for path, kept in self.plan.heads.items()},
            "importance": {} if self.measured is None else final_importance(self.measured, self.importance.norm),
            "importance_examples": 0 if self.measured is None else self.measured.examples,
        }

    def lines(self) -> dict[str, str]:
        """What is left, what was to be left, the ranks, and what the importance was measured on."""
        if self.plan is None:
            return {}
        rows = left_lines(self.summary()["structure"])
        if self.prune.target is not None:
            rows["target"] = ", ".join(f"{share:.1%} of {name}" for name, share in self.prune.target.items())
        if self.measured is not None:
            source = "" if self.importance.file is None else f", from {self.importance.file}"
            rows["importance"] = f"of {self.measured.examples:,} examples{source}"
        return rows
