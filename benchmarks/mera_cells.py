"""The cells of MerA's tables in one small file each: settings, scores, and what was predicted for every test row.

A cell is one tuned model on one data split. Its predictions are classes, packed into as few bits as the task has
classes for; the truths are kept once a task. Accuracy, F1, intervals and tests follow from this file alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import DataError

__all__ = ["Cell", "Results", "pack", "read_results", "unpack"]

_FORMAT = 1
_Classes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on one split.

    Attributes:
        arm: name of the method with its variant, a row of a table.
        task: name in the table of tasks.
        shots: per class.
        seed: of the split.
        setting: what was chosen for it: learning rate, epochs and the like.
        dev: scores on the dev shots.
        predictions: a class for each test row.
        seconds: that it took.
        steps: of the optimiser.
        trained: trained parameters.
    """

    arm: str
    task: str
    shots: int
    seed: int
    setting: dict[str, Any] = field(default_factory=dict)
    dev: dict[str, float] = field(default_factory=dict)
    predictions: Sequence[int]
    seconds: float = 0.0
    steps: int = 0
    trained: int = 0


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a table is made of.

    Attributes:
        table: its number.
        environment: versions, commit, device.
        facts: plain values for the lines under the table: sources, choices, minutes.
        truths: task -> class of each test row.
        cells: in the order in which they were run.
    """

    table: str
    environment: dict[str, Any]
    facts: dict[str, Any]
    truths: Mapping[str, Sequence[int]]
    cells: Sequence[Cell]

    def scores(self, arm: str, task: str, shots: int) -> dict[int, _Classes]:
        """Return seed -> whether each test row was answered right, ``[I]``; empty where nothing was run."""
        truth_I = np.asarray(self.truths.get(task, ()))
        return {
            cell.seed: (np.asarray(cell.predictions) == truth_I).astype(np.uint8)
            for cell in sorted(self.cells, key=lambda cell: cell.seed)
            if (cell.arm, cell.task, cell.shots) == (arm, task, shots)
        }

    def write(self, path: Path) -> None:
        """Write the file, in one step.

        Raises:
            DataError: a cell has other rows than its task's truths.
        """
        truths = {task: _packed(values) for task, values in self.truths.items()}
        cells = []
        for cell in self.cells:
            if cell.task not in self.truths or len(cell.predictions) != len(self.truths[cell.task]):
                raise DataError(f"{path}: {cell.arm} on {cell.task} has {len(cell.predictions)} predictions")
            cells.append(asdict(cell) | {"predictions": _packed(cell.predictions)})
        head = {"format": _FORMAT, "table": self.table, "environment": self.environment, "facts": self.facts}
        lines = [json.dumps(cell, sort_keys=True, allow_nan=False) for cell in cells]
        start = json.dumps(head | {"truths": truths}, indent=1, sort_keys=True, allow_nan=False)
        text = start[:-2] + ',\n "cells": [\n' + ",\n".join(lines) + "\n ]\n}\n"
        atomic_write(path, lambda file: file.write(text.encode()))


def read_results(path: Path) -> Results:
    """Return what :meth:`Results.write` wrote. Raises DataError, with the path, for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        values["truths"] = {task: _unpacked(packed) for task, packed in values["truths"].items()}
        cells = [Cell(**(cell | {"predictions": _unpacked(cell["predictions"])})) for cell in values.pop("cells")]
        return Results(**values, cells=cells)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} holds no cells of a table: {error!r}") from error


def pack(classes: Sequence[int], bits: int) -> str:
    """Return numbers below 2 ** bits as text, five characters for 32 bits.

    >>> unpack(pack([2, 0, 1], 2), 2, 3)
    [2, 0, 1]
    """
    values_I = np.asarray(classes, dtype=np.int64)
    if len(values_I) and (values_I.min() < 0 or values_I.max() >> bits):
        raise DataError(f"classes from {values_I.min()} to {values_I.max()}: {bits} bits hold 0 to {2**bits - 1}")
    bits_IK = (values_I[:, None] >> np.arange(bits)) & 1
    return base64.b85encode(np.packbits(bits_IK.astype(np.uint8).ravel()).tobytes()).decode()


def unpack(text: str, bits: int, count: int) -> list[int]:
    """Return the ``count`` numbers that :func:`pack` packed."""
    found = np.unpackbits(np.frombuffer(base64.b85decode(text), dtype=np.uint8), count=count * bits)
    return [int(value) for value in (found.reshape(count, bits) << np.arange(bits)).sum(1)]


def _packed(classes: Sequence[int]) -> list[Any]:
    bits = max(1, int(max(classes, default=0)).bit_length())
    return [bits, len(classes), pack(classes, bits)]


def _unpacked(packed: Sequence[Any]) -> list[int]:
    bits, count, text = packed
    return unpack(text, bits, count)
