"""A run that early stopping has ended says so, and stays ended when it is started again."""

from __future__ import annotations

import sys

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping

__all__ = ["StayStopped"]


class StayStopped(Callback):
    """Ends a fit before its first step where the checkpoint says that early stopping had run out of patience.

    Lightning's own callback waits for a further validation, for which a finished run would train on.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what the callbacks were restored to."""
        if _ended(trainer):
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which metric has ended the run, and after how long."""
        for callback in _ended(trainer) if trainer.is_global_zero else ():
            sys.stderr.write(
                f"ended early: {callback.monitor} is no better than {float(callback.best_score):.4f} for "
                f"{callback.wait_count} validations\n"
            )


def _ended(trainer: L.Trainer) -> list[EarlyStopping]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    stopping = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
    return [callback for callback in stopping if callback.wait_count >= callback.patience > 0]
