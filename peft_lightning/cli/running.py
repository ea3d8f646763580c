"""What a configuration adds to a run: its callbacks and loggers, in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from peft_lightning.atomic import atomic_write
from peft_lightning.callbacks.stopping import StayStopped
from peft_lightning.errors import UsageError
from peft_lightning.files.checksum import sum_of

__all__ = ["Agreed", "Kept", "listed", "placed"]


class Agreed(Callback):
    """Compares what the processes of a job go on from, before any of them takes it: each has looked for itself.

    Args:
        path: of this process's checkpoint; None where it found none.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse different ones, in every process.

        Raises:
            UsageError: says what the first process found, and what the first of those found that differ from it.
        """
        if trainer.world_size == 1:
            return
        found: list[tuple[str, str]] = [("", "")] * trainer.world_size
        dist.all_gather_object(found, (str(self.path), sum_of(self.path)) if self.path else ("none", ""))
        first = _told(*found[0])
        for rank, (path, digest) in enumerate(found):
            if digest != found[0][1] or (path == "none") != (found[0][0] == "none"):
                raise UsageError(
                    f"checkpoint to go on from: process 0 found {first}, process {rank} found {_told(path, digest)}; "
                    "the run's folder must be one that all nodes see"
                )


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


def _told(path: str, digest: str) -> str:
    return f"{path} (SHA-256 {digest[:12]})" if digest else path


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
