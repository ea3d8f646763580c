"""What a configuration adds to a run: its callbacks and loggers, in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from peft_lightning.callbacks.stopping import StayStopped

__all__ = ["listed", "placed"]


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
