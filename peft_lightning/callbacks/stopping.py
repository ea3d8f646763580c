"""A run that early stopping has ended stays ended when it is started again."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping

__all__ = ["StayStopped"]


class StayStopped(Callback):
    """Ends a fit before its first step where the checkpoint says that early stopping had run out of patience.

    Lightning's own callback waits for a further validation, for which a finished run would train on.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what the callbacks were restored to."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stopping = [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
        if any(callback.wait_count >= callback.patience > 0 for callback in stopping):
            trainer.should_stop = True
