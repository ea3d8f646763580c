"""What a configuration adds to a run: its callbacks and loggers, in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from peft_lightning.atomic import atomic_write
from peft_lightning.callbacks.stopping import StayStopped

__all__ = ["Kept", "listed", "placed"]


class Kept(Callback):
    """Writes a run's configuration once the training has begun with it.

    Args:
        path: of the file.
        text: its content.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it."""
        atomic_write(self.path, lambda file: file.write(self.text.encode()))


def listed(value: Any) -> list[Any]:
    """A list of what the parser gives as a list, as one value, or not at all."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def placed(callbacks: Any, folder: Path) -> list[Any]:
    """The user's callbacks: further checkpoints go to ``best_k`` in the run's folder, and what has stopped stays so."""
    found = listed(callbacks)
    for callback in found:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / "best_k")
    return [*found, StayStopped()] if any(isinstance(callback, EarlyStopping) for callback in found) else found
