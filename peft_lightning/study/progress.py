"""One line that says where a study stands: cells, what is being run, time left."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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
        workers: how many groups are run at a time.
        seconds: between two lines where the output is not a terminal.
    """

    def __init__(self, cells: Sequence[Cell], finished: int, workers: int = 1, seconds: float = 10.0) -> None:
        self.left = list(cells)
        self.done, self.total, self.failed = finished, finished + len(cells), 0
        self.seconds = seconds
        self._workers, self._shown = workers, -seconds
        self._running: list[_Running] = []
        self._took: dict[Any, list[float]] = defaultdict(list)

    def begin(self, group: Sequence[Cell]) -> None:
        """A group of cells starts."""
        self._running.append(_Running(list(group), time.monotonic()))
        self.tick(0.0)

    def tick(self, share: float) -> None:
        """A share of the group that began last is done."""
        self._running[-1].share = share
        if time.monotonic() - self._shown >= (0.5 if sys.stderr.isatty() else self.seconds):
            self._show()

    def end(self, group: Sequence[Cell], failures: int) -> None:
        """A group is finished."""
        ended = next(running for running in self._running if running.group[0] is group[0])
        self._running.remove(ended)
        each = (time.monotonic() - ended.began) / len(group)
        for cell in group:
            self.left.remove(cell)
            for key in _keys(cell):
                self._took[key].append(each)
        self.done += len(group)
        self.failed += failures
        if not self.left:
            self._show()
            sys.stderr.write("\n" if sys.stderr.isatty() else "")

    def time_left(self) -> timedelta | None:
        """Return an estimate, or None before anything is known."""
        known, running = bool(self._took), self._running
        begun = sum(len(one.group) for one in running)
        if not known and not any(one.share for one in running):
            return None
        here = [self._left_of(one) for one in running]
        if not known:
            each = max(one.passed / one.share / len(one.group) for one in running if one.share)
            return timedelta(seconds=round((sum(here) + each * (len(self.left) - begun)) / self._workers))
        waiting = [cell for cell in self.left if not any(cell is other for one in running for other in one.group)]
        return timedelta(seconds=round((sum(here) + sum(map(self._expected, waiting))) / self._workers))

    def _left_of(self, one: _Running) -> float:
        if one.share > 0:
            return one.passed * (1 - one.share) / one.share
        return max(0.0, sum(map(self._expected, one.group)) - one.passed) if self._took else 0.0

    def _expected(self, cell: Cell) -> float:
        known = next(self._took[key] for key in _keys(cell) if self._took.get(key))
        return sum(known) / len(known)

    def _show(self) -> None:
        self._shown = time.monotonic()
        terminal = sys.stderr.isatty()
        done = self.done + sum(one.share * len(one.group) for one in self._running)
        parts = [f"cell {done:.0f}/{self.total}"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self._running:
            first, beside = self._running[-1].group[0], sum(len(one.group) for one in self._running) - 1
            parts.append(f"{first.title}{f' and {beside} beside it' if beside else ''}")
            left = self.time_left()
            parts.append(f"{'?' if left is None else left} left")
        text = "  ".join(parts)
        sys.stderr.write(f"\r{text}\x1b[K" if terminal else f"{text}\n")
        sys.stderr.flush()


@dataclass
class _Running:
    """A group that is being run."""

    group: list[Cell]
    began: float
    share: float = 0.0

    @property
    def passed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began


def _keys(cell: Cell) -> tuple[Any, ...]:
    """What the time of a cell is learned for, the nearest first."""
    length = cell.epochs, cell.steps
    return (cell.method, cell.task, cell.shots, *length), (cell.method, *length), ()
