"""What a study needs, looked at before its first cell: rows enough for every draw, and the adapters to start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_lightning.backbones.build import build_backbone, fingerprint
from peft_lightning.errors import DataError, PeftLightningError
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.sources import read_source, source_names
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import MergeSource, merged_config
from peft_lightning.study.cells import Cell
from peft_lightning.study.splits import Splits

__all__ = ["check_cells"]


def check_cells(cells: Sequence[Cell], splits: Splits) -> None:
    """Draw and encode the rows of all cells, which they share, and read the adapters that methods start from.

    Args:
        cells: to be run.
        splits: gives the rows.

    Raises:
        DataError: lists what is missing, with the task and shots, or the method and task, that it is missing for.
    """
    draws = {(cell.task, cell.shots, cell.seed): cell for cell in cells}
    methods = {(cell.method, cell.variant, cell.task): cell for cell in cells}
    backbones: dict[str, tuple[nn.Module, dict[str, Any] | None]] = {}
    seen: dict[tuple[str, str], ForeignAdapter] = {}
    wrong: dict[str, None] = {}
    for (task, shots, _), cell in draws.items():
        try:
            splits.data(cell)
        except PeftLightningError as error:
            wrong[f"task {task}, {shots} shots: {error}"] = None
    for (method, variant, task), cell in methods.items():
        try:
            _read_sources(cell, backbones, seen)
        except PeftLightningError as error:
            wrong[f"method {method} ({variant}), task {task}: {error}"] = None
    if wrong:
        raise DataError(f"nothing is run before this is mended: {'; '.join(wrong)}")


def _read_sources(
    cell: Cell,
    backbones: dict[str, tuple[nn.Module, dict[str, Any] | None]],
    seen: dict[tuple[str, str], ForeignAdapter],
) -> None:
    """Read the adapters that a cell starts from, each once, and see whether they merge.

    The weights of a random backbone are not compared.
    """
    module = cell.module()
    config, merge = module.backbone_config, getattr(module, "merge", None)
    paths = getattr(module, "sources", ())
    given = []
    for name, path in zip(source_names(paths) if paths else (), paths, strict=True):
        if (path, repr(config)) not in seen:
            if repr(config) not in backbones:
                backbone = build_backbone(config)
                backbones[repr(config)] = backbone, fingerprint(backbone) if config.name else None
            backbone, known = backbones[repr(config)]
            seen[path, repr(config)] = read_source(path, backbone=backbone, fingerprint=known)
        found = seen[path, repr(config)]
        given.append(MergeSource(name=name, adapter=found.adapter, tensors=found.tensors, masks=found.masks))
    if isinstance(merge, MergeConfig):
        merged_config(given, merge)
