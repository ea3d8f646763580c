"""One line that says where a study stands: cells, what is being run, time left."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from peft_lightning.study.cells import Cell

__all__ = ["Progress"]


class Progress:
    """Rewrites one line on a terminal; prints a line every few seconds elsewhere (a cluster's log file).

    The time left of a cell is what cells of its method took so far, for as many epochs or steps; else what all took.

    Args:
        cells: to be run.
        finished: how many others were there already.
        seconds: between two lines where the output is not a terminal.
    """

    def __init__(self, cells: Sequence[Cell], finished: int, seconds: float = 10.0) -> None:
        self.left = list(cells)
        self.done, self.total, self.failed = finished, finished + len(cells), 0
        self.seconds = seconds
        self._shown = -seconds
        self._began = time.monotonic()
        self._group: list[Cell] = []
        self._took: dict[Any, list[float]] = defaultdict(list)

    def begin(self, group: Sequence[Cell]) -> None:
        """A group of cells starts."""
        self._group, self._began = list(group), time.monotonic()
        self.tick(0.0)

    def tick(self, share: float) -> None:
        """A share of the group's work is done."""
        if time.monotonic() - self._shown >= (0.5 if sys.stderr.isatty() else self.seconds):
            self._show(share)

    def end(self, failures: int) -> None:
        """The group is finished."""
        each = (time.monotonic() - self._began) / max(1, len(self._group))
        for cell in self._group:
            self.left.remove(cell)
            for key in _keys(cell):
                self._took[key].append(each)
        self.done += len(self._group)
        self.failed += failures
        self._group = []
        if not self.left:
            self._show(1.0)
            sys.stderr.write("\n" if sys.stderr.isatty() else "")

    def time_left(self, share: float) -> timedelta | None:
        """Return an estimate, or None before anything is known."""
        passed = time.monotonic() - self._began
        waiting = [cell for cell in self.left if not any(cell is other for other in self._group)]
        known = self._took
        if not known and share <= 0:
            return None
        here = passed * (1 - share) / share if share > 0 else sum(map(self._expected, self._group))
        if not known:
            each = passed / share / max(1, len(self._group))
            return timedelta(seconds=round(here + each * len(waiting)))
        return timedelta(seconds=round(here + sum(map(self._expected, waiting))))

    def _expected(self, cell: Cell) -> float:
        known = next(self._took[key] for key in _keys(cell) if self._took.get(key))
        return sum(known) / len(known)

    def _show(self, share: float) -> None:
        self._shown = time.monotonic()
        terminal = sys.stderr.isatty()
        done = self.done + share * len(self._group)
        parts = [f"cell {done:.0f}/{self.total}"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self._group:
            more = f" and {len(self._group) - 1} beside it" if len(self._group) > 1 else ""
            parts.append(f"{self._group[0].title}{more}")
            left = self.time_left(share)
            parts.append(f"{'?' if left is None else left} left")
        text = "  ".join(parts)
        sys.stderr.write(f"\r{text}\x1b[K" if terminal else f"{text}\n")
        sys.stderr.flush()


def _keys(cell: Cell) -> tuple[Any, ...]:
    """What the time of a cell is learned for, the nearest first."""
    length = cell.epochs, cell.steps
    return (cell.method, cell.task, cell.shots, *length), (cell.method, *length), ()
