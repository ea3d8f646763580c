"""A run that early stopping has ended says so, and stays ended when it is started again."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

__all__ = ["StayStopped"]

_SETTINGS = ("monitor", "mode", "patience", "min_delta", "stopping_threshold", "divergence_threshold", "check_finite")


class StayStopped(Callback):
    """Ends a fit before its first step where the checkpoint says that a validation had stopped it.

    Lightning's own callback waits for a further validation, for which a finished run would train on. Under other
    settings of early stopping than before, the run goes on. It comes after the callbacks that stop.
    """

    def __init__(self) -> None:
        self._stopped: list[dict[str, Any]] | None = None
        self._settings: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The settings under which the run was stopped; None if it was not."""
        return {"stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over why it was."""
        self._stopped = state_dict["stopped"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note the settings, before the checkpoint brings back what they were."""
        self._settings = [
            {name: float(value) if isinstance(value := getattr(callback, name), int) else value for name in _SETTINGS}
            for callback in _stopping(trainer)
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop what was stopped."""
        if self._stopped == self._settings:
            trainer.should_stop = True
            return
        self._stopped = None
        for callback in _stopping(trainer):
            callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See whether early stopping has stopped the run, and not, say, a limit of time."""
        if trainer.state.fn == "fit":
            stopped = any(c.stopping_reason != EarlyStoppingReason.NOT_STOPPED for c in _stopping(trainer))
            self._stopped = self._settings if stopped else None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which metric has ended the run, and after how long."""
        ended = [callback for callback in _stopping(trainer) if callback.wait_count >= callback.patience > 0]
        for callback in ended if trainer.is_global_zero else ():
            sys.stderr.write(
                f"ended early: {callback.monitor} is no better than {float(callback.best_score):.4f} for "
                f"{callback.wait_count} validations\n"
            )


def _stopping(trainer: L.Trainer) -> list[EarlyStopping]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
