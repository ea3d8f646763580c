"""MerA (He et al., 2023, arXiv:2308.15982): pretrained adapters merged into one, which is then tuned on a few examples.

Section 2, with symbol = setting: the pretrained adapters = ``sources``; equations 1 and 2 (summation, averaging) and 3
to 5 (alignment by optimal transport of weights or activations, average of what is aligned) = ``merge.preset``; how each
is computed, and where it leaves the paper: functional/merging and layers/merging. Section 3: the merged adapter is
plugged into the backbone before the first step, and trained with the task's head as any adapter; of one source it is
the paper's "+Single". Deviations, each for a reason:

* the default is ours, ``select``, and not one of the paper's four, of which it is better than any on every target
  measured here, from four tracks or its own; from a track that does not fit, ``acts`` may be (benchmarks/RESULTS.md);
* activations come from unlabelled inputs of the target task (the paper does not say from which): the training rows, or
  what the data module's ``calibration_dataloader`` gives; read without dropout, and without a trace in any random
  state, so that all merges begin with the same head and the same batches;
* Adam's betas and weight decay are the paper's (section 3.1), the decay in its decoupled form; the rate is larger, as
  adapters want it, and the paper's grid is in configs/mera.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.manifest import MANIFEST_KEY
from peft_lightning.files.several import read_sources, source_paths
from peft_lightning.files.strict import check_tensors
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.masked import prunable
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import MergeSource, merge_adapters, merged_config, needs_data
from peft_lightning.scoring import over_ranks, unlabelled_inputs
from peft_lightning.seeding import seeded_on_cpu
from peft_lightning.settings import OptimConfig, as_config
from peft_lightning.sourced_module import SourcedModule
from peft_lightning.tasks.table import Task

__all__ = ["MerAModule"]


class MerAModule(SourcedModule):
    """Merges pretrained adapters into one, then trains that and the task's head; the backbone is frozen.

    A merge that needs no data is done when the module is built, any other one when a Trainer brings data: before the
    first step, before the first validation, also where nothing is ever trained. :meth:`merge_sources` does it by hand.
    A file holds the merged adapter, and needs no folder of a source.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        sources: the adapters to merge: folders of AdapterHub's library, PEFT's (LoRA) or ours, a run's, checkpoints.
        merge: how they are merged.
        optim: the optimiser's settings.
        head: ``dense`` (dense, tanh, linear), ``linear``, or ``auto``: dense on the token that stands for a text,
            linear on every token.
        head_dropout: dropout in the head.
        class_weights: one weight per class in the loss.
        max_length: tokens at most in ``predict``.
        seed: of initial values and dropout.

    Raises:
        UsageError: if a value is not allowed.
    """

    fixed_by_file = (*SourcedModule.fixed_by_file, "merge")

    def __init__(
        self,
        task: str | Task,
        backbone: str | BackboneConfig,
        sources: Sequence[str],
        merge: MergeConfig = MergeConfig(),
        optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98)),
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
        self.sources = source_paths(sources)
        self.merge = as_config(MergeConfig, merge)
        self.record(sources=self.sources, merge=self.merge)
        self.adapter: AdapterConfig | None = None
        self.adapters: dict[str, nn.Module] = {}
        self.masked = False
        self.merged: dict[str, Any] | None = None
        self._given: list[MergeSource] = []
        self._origins: list[dict[str, Any]] = []

    # -- construction ----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hook an adapter of the merged one's shape on the backbone.

        Raises:
            UsageError: if the sources cannot become one.
            CheckpointError: if a source is damaged, or belongs to another backbone.
        """
        if self.adapter is None and self.waits_for_file(self.sources):
            return
        if self.adapter is None:
            self._read()
            self.adapter = merged_config(self._given, self.merge)
            self.masked = _has_masks(self._given, self.merge)
        self.adapters = attach_adapters(self.backbone, self.adapter, masked=self.masked)

    def declared(self) -> Iterator[nn.Module]:
        """The adapter's layers and the head."""
        yield from self.adapters.values()
        yield self.head

    def configure_model(self) -> None:
        """Build the model, and merge where that needs no data and no file brings the result."""
        super().configure_model()
        if self.merged is None and self._given and not needs_data(self._given, self.merge):
            with seeded_on_cpu(self.seed):
                self._merge(None)

    def _read(self) -> None:
        self._given, self._origins = read_sources(self.sources, self.backbone, self.backbone_fingerprint)

    # -- merging ---------------------------------------------------------------------------------------------

    def merge_sources(self, batches: Iterable[Mapping[str, Any]] | None = None) -> MerAModule:
        """Merge now, without a Trainer. The module comes back; what is merged already stays as it is.

        Args:
            batches: of the task's data, with labels or without, for a merge that needs some.

        Raises:
            UsageError: if there are none and the merge needs some.
        """
        self.configure_model()
        if self.merged is None:
            kept = None if batches is None else list(batches)
            self._merge(None if kept is None else partial(unlabelled_inputs, self, kept))
        return self

    @torch.inference_mode(False)
    def _merge(self, batches: Callable[[], Iterable[Mapping[str, Any]]] | None) -> None:
        """Read the sources if need be, merge them, and give all ranks what rank 0 has."""
        if not self._given:
            self._read()
        with torch.random.fork_rng():  # a user's own loader may shuffle by the global state
            found = merge_adapters(self.backbone, self._given, self.merge, batches, partial(over_ranks, self))
        new = {**found.tensors, **{f"{name}_mask": mask for name, mask in found.masks.items()}}
        content = {name: tensor.cpu() for name, tensor in new.items()}, found.report
        tensors, report = content if self._trainer is None else self.trainer.strategy.broadcast(content, src=0)
        own = {
            f"{path}.{name}": tensor.detach()
            for path, adapter in self.adapters.items()
            for name, tensor in adapter.state_dict().items()
        }
        kept = {name: torch.ones_like(tensor).cpu() for name, tensor in own.items() if name.endswith("_mask")}
        tensors = {**kept, **tensors}
        check_tensors(tensors, own, ", ".join(self.sources))
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.merged = {**report, "origins": self._origins}
        self._given = []

    def begin(self) -> None:
        """Merge on what the trainer's data module has, unless it is done."""
        super().begin()
        if self.merged is None:
            self._merge(partial(unlabelled_inputs, self))

    def predict(self, texts: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        """Answers for texts; see :meth:`TaskModule.predict`.

        Raises:
            UsageError: also if nothing is merged yet.
        """
        self.configure_model()
        self.require_merged("predict")
        return super().predict(texts, batch_size)

    def require_merged(self, what: str) -> None:
        """Refuse what an adapter that is not there yet cannot do.

        Raises:
            UsageError: names the ways to merge.
        """
        if self.merged is None:
            raise UsageError(
                f"{what}: the adapters are not merged yet, for merge.preset = {self.merge.preset!r} needs unlabelled "
                "data; fit, validate or test the module, or give merge_sources some batches"
            )

    # -- files -----------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Adds the merged adapter's shape, and how it came about; None before the merge."""
        adapter = None if self.adapter is None else asdict(self.adapter)
        return {**super().manifest(), "adapter": adapter, "merged": self.merged}

    def before_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the adapter's shape and the merge out of a file, so that nothing is merged again.

        Raises:
            CheckpointError: if they are missing or malformed, or another shape than this module's.
        """
        manifest = checkpoint.get(MANIFEST_KEY, {})
        merged = manifest.get("merged")
        try:
            adapter = as_config(AdapterConfig, dict(manifest["adapter"]))
            if merged is not None and not (type(merged["tokens"]) is int and isinstance(merged["sources"], list)):
                raise ValueError("its merge")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint: damaged (of its adapter: {error!r:.200})") from None
        if self.adapter not in (None, adapter):
            raise CheckpointError(f"checkpoint: holds {adapter}, the sources give {self.adapter}")
        self.adapter, self.merged, self._given = adapter, merged, []
        self.take_shape()
        if not self._built:
            self.masked = any(str(name).endswith("_mask") for name in checkpoint["state_dict"])

    # -- reports ---------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Adds the adapter, how many of its weights masks keep, and the merge."""
        assert self.adapter is not None
        weights = [parameter for adapter in self.adapters.values() for parameter in prunable(adapter).values()]
        total = sum(parameter.weight.numel() for parameter in weights)
        kept = sum(p.weight.numel() if p.mask is None else int(p.mask.sum()) for p in weights)
        base = super().summary()
        trained = base["trained_parameters"] - (total - kept)
        return {
            **base,
            "trained_parameters": trained,
            "adapter_parameters": trained - base["head_parameters"],
            "kept_share": kept / total,
            "adapters": {**asdict(self.adapter), "sites": list(self.adapters)},
            "merged": self.merged,
        }

    def lines(self) -> dict[str, str]:
        """The adapter, and what it was made of."""
        assert self.adapter is not None
        facts, merged = self.summary(), self.merged or {}
        sparse = f", {facts['kept_share']:.4f} of its weights kept" if self.masked else ""
        names = ", ".join(str(name) for name in merged.get("sources", ()))
        read = merged.get("tokens") or 0
        fewer = f" (of {self.merge.tokens:,} asked for)" if read < self.merge.tokens else ""
        tokens = f", on {read:,} tokens{fewer}" if read else ""
        shape = f"{self.adapter.kind}, width {self.adapter.bottleneck}, {len(self.adapters)} places{sparse}"
        return {"adapters": shape, "merged": f"{self.merge.preset} of {names or 'nothing yet'}{tokens}"}


def _has_masks(sources: Sequence[MergeSource], config: MergeConfig) -> bool:
    """Whether the merged adapter may have masks: union or budget of those of bottlenecks, LoRA's side by side."""
    masked = any(source.masks for source in sources)
    if config.for_updates:
        return masked and config.preset == "cat"
    return masked or config.recipe.get("masks") == "budget"
