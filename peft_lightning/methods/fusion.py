"""AdapterFusion (Pfeiffer et al., 2021, arXiv:2005.00247): pretrained adapters stay as they are, and attention over
their outputs is trained.

Second stage of its two, section 3.2; the formula and where it goes: layers/fusion. MerA's main baseline (section 3 of
arXiv:2308.15982), and S-AF of SparseAdapter's table 4 where the adapters are sparse: their masks come along. Deviations
from AdapterHub's library, each for a reason:

* the regulariser of the values, ``penalty |I - V|^2``, is a term of the loss: once per optimizer step, whatever is
  accumulated and on however many ranks, and in what is logged (there it is added to gradients after the step);
* no weight decay unasked: it pulls the values to 0, the regulariser pulls them to the identity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.adapterhub_fusion import ForeignFusion, read_fusion
from peft_lightning.files.manifest import MANIFEST_KEY
from peft_lightning.files.several import read_sources, source_paths
from peft_lightning.files.strict import check_fingerprint, check_tensors
from peft_lightning.layers.adapters import AdapterConfig
from peft_lightning.layers.fusion import AdapterFusion, attach_fusion, identity_penalty
from peft_lightning.layers.merge_sources import MergeSource
from peft_lightning.settings import OptimConfig, as_config
from peft_lightning.sourced_module import SourcedModule
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.table import Task

__all__ = ["FusionModule"]


class FusionModule(SourcedModule):
    """Trains attention over the outputs of frozen adapters, and a new head.

    A file holds the adapters too: it needs the backbone only, and no folder of a source.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        sources: folders of two adapters or more, of one kind (houlsby or pfeiffer): AdapterHub's, ours, or a run's.
        fusion: folder of an AdapterFusion of AdapterHub's library, over adapters of these names, to begin from.
        penalty: weight of the regulariser that keeps the values near the identity.
        score_dropout: dropout of the scores; None: as the fusion's folder says, or as in the backbone's attention.
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

    fixed_by_file = (*SourcedModule.fixed_by_file, "fusion", "penalty", "score_dropout")

    def __init__(
        self,
        task: str | Task,
        backbone: str | BackboneConfig,
        sources: Sequence[str],
        fusion: str | None = None,
        penalty: float = 0.01,
        score_dropout: float | None = None,
        optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.0),
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
        if not (math.isfinite(penalty) and penalty >= 0):
            raise UsageError(f"penalty = {penalty}: must be at least 0")
        if score_dropout is not None and not 0 <= score_dropout < 1:
            raise UsageError(f"score_dropout = {score_dropout}: must be at least 0 and below 1, or null")
        self.sources = source_paths(sources, least=2)
        self.fusion = None if fusion is None else str(fusion)
        self.penalty, self.score_dropout = penalty, score_dropout
        self.record(sources=self.sources, fusion=self.fusion, penalty=penalty, score_dropout=score_dropout)
        self.shapes: list[AdapterConfig] = []
        self.masked = False
        self.fusions: dict[str, AdapterFusion] = {}
        self.adapters: dict[str, nn.Module] = {}

    # -- construction ----------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the adapters and the fusion over them on the backbone; a file that is being loaded brings its own.

        Raises:
            UsageError: if the adapters cannot be fused.
            CheckpointError: if a folder is damaged, or belongs to another backbone.
        """
        if not self.shapes and self.waits_for_file([*self.sources, *([self.fusion] if self.fusion else [])]):
            return
        given: list[MergeSource] = []
        start = None
        if not self.shapes:
            given, _ = read_sources(self.sources, self.backbone, self.backbone_fingerprint)
            start = None if self.fusion is None else read_fusion(self.fusion)
            given = _named(given) if start is None else _in_order(given, start, str(self.fusion))
            self.shapes, self.masked = [source.adapter for source in given], any(source.masks for source in given)
            if start is not None and self.score_dropout is None:
                self.score_dropout = start.dropout
        self.fusions = attach_fusion(self.backbone, self.shapes, dropout=self.score_dropout, masked=self.masked)
        names = {adapter.name for adapter in self.shapes}
        found = {path: path.rpartition(".adapters.") for path, _ in self.backbone.named_modules()}
        self.adapters = {
            path: self.backbone.get_submodule(path)
            for path, (_, inside, name) in found.items()
            if inside and name in names
        }
        if given:
            self._fill(self.adapters, given)
        if start is not None:
            self._start(start)

    def _fill(self, adapters: Mapping[str, nn.Module], given: Sequence[MergeSource]) -> None:
        """Give the adapters their values; one without masks keeps all, where others have some."""
        own = _states(adapters)
        new = {name: torch.ones_like(tensor) for name, tensor in own.items() if name.endswith("_mask")}
        for source in given:
            new |= {**source.tensors, **{f"{name}_mask": mask for name, mask in source.masks.items()}}
        _copy(new, own, ", ".join(self.sources))

    def _start(self, start: ForeignFusion) -> None:
        """Begin where another fusion ended."""
        config: Any = self.backbone.config
        check_fingerprint(start.base, {name: getattr(config, name, None) for name in start.base}, str(self.fusion))
        _copy(start.tensors, _states(self.fusions), str(self.fusion))

    def declared(self) -> Iterator[nn.Module]:
        """Fusions and head."""
        yield from self.fusions.values()
        yield self.head

    def owned_state(self) -> dict[str, Tensor]:
        """Adds the frozen adapters, so that a file is complete."""
        frozen = {f"backbone.{name}": tensor for name, tensor in _states(self.adapters).items()}
        return {**super().owned_state(), **frozen}

    # -- training --------------------------------------------------------------------------------------------

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Adds the regulariser times the batch's weight: divided by the weight of the whole step it is there once."""
        total, weight = super().batch_loss(batch)
        return total + weight * identity_penalty(self.fusions, self.penalty), weight

    # -- files -----------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Adds the adapters' shapes and the dropout of the scores."""
        fused = {"adapters": [asdict(shape) for shape in self.shapes], "dropout": self.score_dropout}
        return {**super().manifest(), "fused": fused}

    def before_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the adapters' shapes out of a file, which holds their values.

        Raises:
            CheckpointError: if they are missing or malformed, or not those of this module.
        """
        fused = checkpoint.get(MANIFEST_KEY, {}).get("fused")
        try:
            shapes = [as_config(AdapterConfig, dict(shape)) for shape in fused["adapters"]]
            dropout = None if fused["dropout"] is None else float(fused["dropout"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint: damaged (of its adapters: {error!r:.200})") from None
        if self.shapes and self.shapes != shapes:
            raise CheckpointError("checkpoint: its adapters are not of the shapes that those in sources have")
        self.shapes, self.score_dropout = shapes, dropout
        self.take_shape()
        if not self._built:
            self.masked = any(str(name).endswith("_mask") for name in checkpoint["state_dict"])

    # -- reports ---------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Adds what is fused, and how many parameters the fusions have."""
        base = super().summary()
        return {
            **base,
            "fusion_parameters": base["trained_parameters"] - base["head_parameters"],
            "adapters": {"kind": self.shapes[0].kind, "names": [shape.name for shape in self.shapes]},
            "sites": list(self.fusions),
        }

    def lines(self) -> dict[str, str]:
        """The adapters that are fused."""
        names = ", ".join(shape.name for shape in self.shapes)
        sparse = ", sparse" if self.masked else ""
        return {"fused adapters": f"{names} ({self.shapes[0].kind}, {len(self.fusions)} places{sparse})"}


def _named(given: Sequence[MergeSource]) -> list[MergeSource]:
    """Adapters with names of their own inside the backbone: theirs, or where two are alike those of their folders."""
    names = [source.adapter.name for source in given]
    if len(set(names)) < len(names):
        names = [re.sub(r"[^\w-]", "_", source.name) for source in given]
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names)]
    return [_renamed(source, name) for source, name in zip(given, names, strict=True)]


def _renamed(source: MergeSource, name: str) -> MergeSource:
    old, new = f".adapters.{source.adapter.name}.", f".adapters.{name}."
    return replace(
        source,
        adapter=replace(source.adapter, name=name),
        tensors={key.replace(old, new, 1): tensor for key, tensor in source.tensors.items()},
        masks={key.replace(old, new, 1): mask for key, mask in source.masks.items()},
    )


def _in_order(given: Sequence[MergeSource], start: ForeignFusion, folder: str) -> list[MergeSource]:
    """The adapters that a fusion is over, in its order."""
    by_name = {source.adapter.name: source for source in given}
    if sorted(source.adapter.name for source in given) != sorted(start.names):
        raise UsageError(f"fusion = {folder!r}: is over {', '.join(start.names)}; sources are {', '.join(by_name)}")
    return [by_name[name] for name in start.names]


def _states(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors by their names inside the bare backbone."""
    return {f"{path}.{name}": t.detach() for path, module in modules.items() for name, t in module.state_dict().items()}


@torch.no_grad()
def _copy(new: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    check_tensors(new, own, what)
    for name, tensor in own.items():
        tensor.copy_(new[name])
