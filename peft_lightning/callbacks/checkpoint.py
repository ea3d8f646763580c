"""Checkpoints that survive: atomic, with a checksum, and with all that a resumed run needs.

``last.ckpt`` holds a state from which the run goes on as if nothing had happened, ``previous.ckpt`` the one before, and
``best.ckpt`` the weights with the best validation metric: the highest, or the lowest where the metric is a loss. States
are those between two optimizer steps: one that is saved within an accumulation is that from before it.

SIGTERM, SLURM's SIGUSR1 and Ctrl-C wait for the next such moment, save and end the process; a second Ctrl-C ends it at
once. What may take long does not make them wait: before a validation the state is saved, so that it can be left; and
within a long accumulation they are looked for as well. Where no such moment comes, since a step waits for something
that has died or hangs, the process ends all the same: on SIGTERM before clusters would end it, on SIGUSR1, which gives
notice, after four times as long. A file that is being written is waited for.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage

from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.errors import UsageError
from peft_lightning.files.latest import LAST, is_whole
from peft_lightning.stopping import SIGNALS, Terminated, end_later, take_over

__all__ = ["RunCheckpoint"]

# Micro-batches of an accumulation between two looks for a signal, for which all ranks wait for each other.
_LOOK = 8
# Seconds that a step may take to get to a signal; clusters kill after 30.
_PATIENCE = 25.0
# Within so many seconds a second signal is the same one: launchers pass on what the terminal sends to all.
_ONCE = 1.0


class RunCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` and ``best.ckpt`` into a run's folder.

    Args:
        folder: the run's folder.
        every_n_steps: optimizer steps between two saves of ``last.ckpt``; before and after a validation it is saved
            too.
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
        self._signalled = 0.0
        self._saved_step = -1
        self._restored: dict[str, Any] | None = None
        self._boundary: dict[str, Any] | None = None
        self._validation_due = self._may_leave = self._writing = self._over = False
        self._trainer: L.Trainer | None = None

    # -- what a checkpoint remembers of the run's folder -------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Best score so far, the length of the log, the last validation's metrics, and whether one comes next."""
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "log_rows": self._log_rows,
            "metrics": self._metrics,
            "validation_due": self._validation_due,
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
        self._trainer = trainer
        self.monitor = self.monitor or getattr(pl_module, "monitor", None)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self._log_rows = 0
        self._metrics: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the log back to the checkpoint; a best score and its file, undamaged, count only together."""
        best, aside = self.folder / "best.ckpt", self.folder / "best.earlier.ckpt"
        new = trainer.ckpt_path is None and trainer.global_step == 0
        if new and trainer.is_global_zero and best.exists():  # the folder would be loaded as that fit's
            best.replace(aside)
            sys.stderr.write(f"peft-lightning: {best} is of an earlier fit: it is {aside.name} now\n")
        if not trainer.strategy.broadcast(is_whole(best) if trainer.is_global_zero else None):
            if self.best_score is not None and trainer.is_global_zero:
                what = f"{'is damaged' if best.exists() else 'is gone'}, with {self.monitor} {self.best_score:.4f}"
                then = "the best from here on takes its place"
                sys.stderr.write(f"peft-lightning: {best} (step {self.best_step}) {what}; {then}\n")
            self.best_score, self.best_step = None, -1
        for log in self._logs(trainer):
            log.cut(self._restored["log_rows"] if self._restored else 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take signals over from Lightning, which would end inside an accumulation, until the end.

        And let callbacks that look at the last validation, such as early stopping, see it again; or begin with the
        validation that the checkpoint was saved before.
        """
        restored = self._restored or {}
        metrics = restored.get("metrics", {})
        trainer._logger_connector._callback_metrics.update({name: torch.tensor(v) for name, v in metrics.items()})
        if self._restored is not None and trainer.is_global_zero:
            sys.stderr.write(f"goes on after step {trainer.global_step} from {trainer.ckpt_path}\n")
        self._metrics, self._restored = dict(metrics), None
        if restored.get("validation_due"):
            trainer.fit_loop.epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if trainer.fit_loop.restarted_mid_epoch and epochs.ready == epochs.processed:
            trainer.fit_loop.reset_restart_stage()  # that epoch had all its steps: the next is to be counted as begun
        self._signal, self._boundary, self._over = None, None, False
        # a run that has come to its end, and is started again, leaves its checkpoint as it is
        self._saved_step = trainer.global_step if Path(trainer.ckpt_path or "") == self.folder / LAST else -1
        take_over((*SIGNALS, signal.SIGINT), self._remember_signal, _PATIENCE, self._kill_further, self._waits)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at an optimizer-step boundary, when it is time or when a signal came."""
        loop = trainer.fit_loop.epoch_loop
        if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            return  # a state saved now would skip the validation that is due; it is saved when that begins
        if loop._should_accumulate():
            looks = trainer.world_size == 1 or loop.batch_progress.current.ready % _LOOK == 0
            if looks and self._asked_to_stop(trainer):
                self._save_last(trainer)
                self._leave(trainer)
            return
        self._remember_boundary(trainer)
        stop = self._asked_to_stop(trainer)
        if stop or trainer.global_step % self.every_n_steps == 0:
            self._save_last(trainer)
        if stop:
            self._leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what a run that ends in this validation goes on from, and let signals end it."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # Lightning resumes no run that has all its steps, so the last validation is one with those before it.
        if trainer.max_steps == -1 or trainer.global_step < trainer.max_steps:
            self._validation_due = not trainer.fit_loop.epoch_loop._should_accumulate()
            self._remember_boundary(trainer)
            self._save_last(trainer)
            self._validation_due = False
        self._may_leave = True
        if self._signal is not None:
            self._leave(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and keep the weights if they are the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._may_leave = False
        self._metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
        score = trainer.callback_metrics.get(str(self.monitor))
        if score is not None and self._is_better(float(score)):
            self.best_score, self.best_step = float(score), trainer.global_step
            content = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
            self._write(trainer, content, "best.ckpt")
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return  # in the middle of an optimizer step: its gradients so far are in no checkpoint
        self._remember_boundary(trainer)
        self._save_last(trainer)
        if self._asked_to_stop(trainer):
            self._leave(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end if nothing saved it yet."""
        self._over = True
        if self._saved_step != trainer.global_step:
            self._save_last(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Pass a signal on to the processes that this one started."""
        self._over = True
        if isinstance(exception, Terminated):
            self._kill_further(exception.number)
            Terminated.end_children()

    def _is_better(self, score: float) -> bool:
        if self.best_score is None:
            return not math.isnan(score)
        return score < self.best_score if str(self.monitor).endswith("loss") else score > self.best_score

    # -- parts -------------------------------------------------------------------------------------------------

    def _remember_boundary(self, trainer: L.Trainer) -> None:
        """Keep what of a state changes within an accumulation; weights and optimizer do not."""
        if trainer.accumulate_grad_batches == 1 or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._count_rows(trainer)
        states = {c.state_key: state for c in trainer.callbacks if (state := c.state_dict())}  # type: ignore[attr-defined]
        loops = trainer._checkpoint_connector._get_loops_state_dict()
        self._boundary = copy.deepcopy({"loops": loops, "callbacks": states})

    def _save_last(self, trainer: L.Trainer) -> None:
        within = trainer.fit_loop.epoch_loop._should_accumulate()
        if within and (self._boundary is None or self._saved_step == trainer.global_step):
            return  # what this fit began with, or what is saved already
        self._count_rows(trainer)
        for log in self._logs(trainer):
            log.sync()
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if within and self._boundary is not None:
            content.update(self._boundary)
        self._write(trainer, content, LAST)
        self._saved_step = trainer.global_step

    def _write(self, trainer: L.Trainer, content: dict[str, Any], name: str) -> None:
        self._writing = True
        try:
            trainer.strategy.save_checkpoint(content, self.folder / name)
            self._writing = not trainer.is_global_zero  # the other processes wait for the first one, which writes
            trainer.strategy.barrier("RunCheckpoint")
        finally:
            self._writing = False

    def _count_rows(self, trainer: L.Trainer) -> None:
        for log in self._logs(trainer):
            self._log_rows = log.rows

    def _remember_signal(self, number: int) -> None:
        if number == self._signal == signal.SIGINT:
            if time.monotonic() - self._signalled < _ONCE:
                return
            raise Terminated(number)  # asked twice: at once
        self._signal, self._signalled = number, time.monotonic()
        if self._may_leave and self._trainer is not None:
            self._leave(self._trainer)
        if number in SIGNALS:
            why = "no step has ended within {:g} s, after which it could be saved"
            end_later(number, self._waits, _PATIENCE, self._kill_further, why)
        again = "; once more ends it at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: ends after this optimizer step and saves{again}\n".encode())

    def _waits(self) -> bool | None:
        return False if self._writing else None if self._over else True

    def _kill_further(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the processes that this one has started, which would wait for it or go on without it."""
        kill = getattr(self._trainer.strategy.launcher, "kill", None) if self._trainer else None
        if kill is not None:
            kill(number)

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        """True on all ranks as soon as any rank got a signal, which then is that of all."""
        if trainer.world_size > 1:
            own = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
            if number := int(trainer.strategy.reduce(own, reduce_op="max")):
                self._signal = number
            return number > 0
        return self._signal is not None

    def _leave(self, trainer: L.Trainer) -> None:
        number = signal.Signals(self._signal or signal.SIGTERM)
        if trainer.is_global_zero:
            last = self.folder / LAST
            before = f"nothing is newer than {last}" if last.exists() else "nothing is saved yet"
            saved = f"all to step {self._saved_step} is in {last}" if self._saved_step >= 0 else before
            where = f"after step {trainer.global_step}, {saved}"
            sys.stderr.write(f"\nstopped by {number.name} {where}\n")
        raise Terminated(number)

    @staticmethod
    def _logs(trainer: L.Trainer) -> list[MetricsCSV]:
        return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
