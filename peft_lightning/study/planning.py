"""Which cells of a study are trained side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peft_lightning.backbones.build import as_backbone_config
from peft_lightning.backbones.sharing import SharedBackbones
from peft_lightning.study.block import shape_of
from peft_lightning.study.cells import Cell

__all__ = ["plan"]


def plan(cells: Sequence[Cell], side_by_side: int, shared: SharedBackbones) -> list[list[Cell]]:
    """Return groups of cells; those of a group are of one task, number of shots, length of training, and shape.

    Cells of one seed come together, since they read the same rows.

    Args:
        cells: to be run.
        side_by_side: how many make a group at most.
        shared: the backbones.
    """
    shapes: dict[tuple[Any, ...], Any] = {}
    groups: dict[Any, list[Cell]] = {}
    for number, cell in enumerate(cells):
        # A random backbone is another one for each seed.
        random = as_backbone_config(cell.arguments["backbone"]).name is None
        name = (cell.method, cell.variant, cell.task, cell.seed if random else None)
        if name not in shapes:
            shapes[name] = None if side_by_side == 1 else _shape(cell, shared)
        length = cell.epochs, cell.steps
        key = (shapes[name], cell.task, cell.shots, length, cell.precision) if shapes[name] else number
        groups.setdefault(key, []).append(cell)
    parts: list[list[Cell]] = []
    for group in groups.values():
        group.sort(key=lambda cell: cell.seed)
        size = math.ceil(len(group) / math.ceil(len(group) / side_by_side))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


def _shape(cell: Cell, shared: SharedBackbones) -> Any:
    """What a cell is grouped by; None where it runs alone.

    One that cannot be built runs alone too: the same error meets it there, and its record keeps it.
    """
    try:
        module = cell.module()
        module.configure_model()
        shape = shape_of(module, shared)
    except Exception:
        return None
    return shape
