"""One line that says where a run stands: step, loss, metric, examples per second, time left.

Evaluation has such a line too, of its batches: a beam search or a long validation is no silence.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

__all__ = ["ProgressLine"]


class ProgressLine(ProgressBar):
    """Rewrites one line on a terminal; prints a line every few seconds elsewhere (a cluster's log file).

    Args:
        seconds: between two lines where the output is not a terminal.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._rows = 0
        self._started_step = 0
        self._start = self._shown = 0.0
        self._evaluation = (0.0, 0)

    def disable(self) -> None:
        """Called on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = self._shown = time.monotonic()
        self._rows, self._started_step = 0, trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count rows; show the line if it is time."""
        self._rows += _rows(batch) * trainer.world_size
        if self._due:
            terminal = sys.stderr.isatty()
            self._show(trainer, "\r" if terminal else "", "" if terminal else "\n")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of an evaluation."""
        self._evaluation = (time.monotonic(), 0)
        if trainer.state.fn != "fit":
            self._shown = self._evaluation[0]

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """Show the line of validation if it is time."""
        if not trainer.sanity_checking:
            self._evaluated(trainer, "validation", trainer.num_val_batches, *batch)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """Show the line of a test if it is time."""
        self._evaluated(trainer, "test", trainer.num_test_batches, *batch)

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        """Show the line of predictions if it is time."""
        self._evaluated(trainer, "predict", trainer.num_predict_batches, *batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the line of training with the new metric; outside of training, clear the last one."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, "\r" if sys.stderr.isatty() else "", "\n")
        elif self._enabled and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")

    on_test_end = on_predict_end = on_validation_end

    @property
    def _due(self) -> bool:
        """Whether the last line is old enough for another one."""
        return time.monotonic() - self._shown >= (0.5 if sys.stderr.isatty() else self.seconds)

    def _evaluated(
        self,
        trainer: L.Trainer,
        stage: str,
        totals: Sequence[float],
        outputs: Any,
        batch: Any,
        number: int,
        loader: int = 0,
    ) -> None:
        """Count a batch of an evaluation; its line gives way to the next on a terminal."""
        start, rows = self._evaluation
        self._evaluation = start, rows + _rows(batch) * trainer.world_size
        if not self._due:
            return
        self._shown = time.monotonic()
        if self._enabled:
            passed, done, total = self._shown - start, number + 1, totals[loader]
            left = timedelta(seconds=round((total - done) * passed / done)) if math.isfinite(total) else "?"
            rate = self._evaluation[1] / max(passed, 1e-9)
            text = f"{stage} batch {done}/{total:.0f}  {rate:.0f} examples/s  {left} left"
            sys.stderr.write(f"\r{text}\x1b[K" if sys.stderr.isatty() else f"{text}\n")
            sys.stderr.flush()

    def _show(self, trainer: L.Trainer, start: str, end: str) -> None:
        self._shown = time.monotonic()
        if not self._enabled:
            return
        passed, steps = self._shown - self._start, trainer.global_step - self._started_step
        total = trainer.estimated_stepping_batches
        parts = [f"step {trainer.global_step}/{total:.0f}"]
        for name, value in sorted(trainer.progress_bar_metrics.items()):
            if name != "v_num":
                parts.append(f"{name} {float(value):,.0f}" if abs(value) >= 1000 else f"{name} {float(value):.4f}")
        parts.append(f"{self._rows / max(passed, 1e-9):.0f} examples/s")
        if steps and total != float("inf"):
            left = timedelta(seconds=round((total - trainer.global_step) * passed / steps))
            parts.append(f"{left} left")
        clear = "\x1b[K" if start else ""  # a shorter line must not leave the end of a longer one
        sys.stderr.write(f"{start}{'  '.join(parts)}{clear}{end}")
        sys.stderr.flush()


def _rows(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping) and isinstance(batch.get("rows"), Tensor):
        return len(batch["rows"])  # a row may be several sequences
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((_rows(value) for value in values if _rows(value)), 0)
