"""Checkpoints that survive: written at optimizer-step boundaries, atomically, with all that a resumed run needs.

``last.ckpt`` holds a state from which the run goes on as if nothing had happened; ``best.ckpt`` holds the weights with
the best validation metric: the highest, or the lowest where the metric is a loss. SIGTERM, or Ctrl-C,
waits for the next boundary, saves and ends the process; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from peft_lightning.atomic import atomic_write
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.errors import CheckpointError, UsageError

__all__ = ["AtomicCheckpointIO", "RunCheckpoint", "Terminated"]


class Terminated(SystemExit):
    """The process was asked to end and has saved its state."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, syncs to the disk, renames; reads tensors and plain containers only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint``; if the disk refuses, the previous file stays.

        Raises:
            CheckpointError: says why nothing was written.
        """
        try:
            atomic_write(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            kept = "the previous one is unchanged" if Path(path).exists() else "there was none before"
            raise CheckpointError(f"{path}: cannot save the checkpoint ({error}); {kept}") from error


class RunCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` and ``best.ckpt`` into a run's folder.

    Args:
        folder: the run's folder.
        every_n_steps: optimizer steps between two saves of ``last.ckpt``; validation ends save it too.
        monitor: metric for ``best.ckpt``, the higher the better, unless its name ends in ``loss``; by default the
            task's first metric, or in pretraining the loss.

    Raises:
        UsageError: if ``every_n_steps`` is below 1.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 200, monitor: str | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps = {every_n_steps}: must be at least 1")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.best_score: float | None = None
        self.best_step = -1
        self._signal: int | None = None
        self._saved_step = -1
        self._restored: dict[str, Any] | None = None

    # -- what a checkpoint remembers of the run's folder -------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Best score so far, the length of the log, and the last validation's metrics."""
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "log_rows": self._log_rows,
            "metrics": self._metrics,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score back; the log is cut when the fit starts."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self._restored = state_dict

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the last validation; of a run that was finished before, what its checkpoint remembers."""
        return dict(self._restored["metrics"] if self._restored else self._metrics)

    # -- hooks -------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make all saving atomic and choose the metric."""
        self.monitor = self.monitor or getattr(pl_module, "monitor", None)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self._log_rows = 0
        self._metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the log back to the checkpoint; a best score counts only with its file."""
        if not trainer.strategy.broadcast((self.folder / "best.ckpt").exists()):
            self.best_score, self.best_step = None, -1
        for log in self._logs(trainer):
            log.cut(self._restored["log_rows"] if self._restored else 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM and Ctrl-C over from Lightning, which would end inside an accumulation, until the end.

        And let callbacks that look at the last validation, such as early stopping, see it again.
        """
        metrics = (self._restored or {}).get("metrics", {})
        trainer._logger_connector._callback_metrics.update({name: torch.tensor(v) for name, v in metrics.items()})
        self._metrics, self._restored = dict(metrics), None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            signal.signal(signal.SIGTERM, self._remember_signal)
            signal.signal(signal.SIGINT, self._remember_signal)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at an optimizer-step boundary, when it is time or when a signal came."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return  # a state saved now would skip the validation that is due; it is saved when that ends
        stop = self._asked_to_stop(trainer)
        if stop or trainer.global_step % self.every_n_steps == 0:
            self._save_last(trainer)
        if stop:
            self._leave(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and keep the weights if they are the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        score = trainer.callback_metrics.get(str(self.monitor))
        if score is not None and self._is_better(float(score)):
            self.best_score, self.best_step = float(score), trainer.global_step
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # in the middle of an optimizer step: its gradients so far are in no checkpoint
        self._save_last(trainer)
        if self._asked_to_stop(trainer):
            self._leave(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end if nothing saved it yet."""
        if self._saved_step != trainer.global_step:
            self._save_last(trainer)

    def _is_better(self, score: float) -> bool:
        if self.best_score is None:
            return not math.isnan(score)
        return score < self.best_score if str(self.monitor).endswith("loss") else score > self.best_score

    # -- parts -------------------------------------------------------------------------------------------------

    def _save_last(self, trainer: L.Trainer) -> None:
        for log in self._logs(trainer):
            log.sync()
            self._log_rows = len(log.read()) if trainer.is_global_zero else 0
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._saved_step = trainer.global_step

    def _remember_signal(self, number: int, frame: Any) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self._signal = number
        again = "; once more ends it at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: ends after this optimizer step and saves{again}\n".encode())

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        """True on all ranks as soon as any rank got a signal."""
        return bool(trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False))

    def _leave(self, trainer: L.Trainer) -> None:
        number = signal.Signals(self._signal or signal.SIGTERM)
        if trainer.is_global_zero:
            last = self.folder / "last.ckpt"
            sys.stderr.write(f"\nstopped by {number.name} after step {trainer.global_step}, all is in {last}\n")
        raise Terminated(128 + number)

    @staticmethod
    def _logs(trainer: L.Trainer) -> list[MetricsCSV]:
        return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
