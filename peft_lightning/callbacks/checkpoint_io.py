"""How a checkpoint gets onto the disk and back: whole or not at all, with a checksum, and never by running code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import CheckpointError
from peft_lightning.files.checksum import verify, write_summed
from peft_lightning.files.latest import LAST, PREVIOUS, is_whole

__all__ = ["AtomicCheckpointIO"]

_LITTLE = 1 << 30


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, syncs to the disk, renames; reads tensors and plain containers only.

    The ``last.ckpt`` that gives way becomes ``previous.ckpt``, unless it is damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own: set[Path] = set()  # written here, so not damaged as far as anybody knows

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` and its SHA-256; if the disk refuses, the previous file stays.

        Raises:
            CheckpointError: says why nothing was written.
        """
        path = Path(path)
        try:
            good = path.name == LAST and (path in self._own or is_whole(path))
            atomic_write(
                path,
                lambda file: write_summed(file, lambda summed: torch.save(checkpoint, summed)),
                keep=PREVIOUS if good else None,
            )
        except (OSError, RuntimeError) as error:
            kept = "the previous one is unchanged" if path.exists() else "there was none before"
            there = next(folder for folder in path.absolute().parents if folder.exists())
            free = shutil.disk_usage(there).free
            room = f", {free / 2**20:.1f} MiB are free there" if free < _LITTLE else ""
            raise CheckpointError(
                f"{path}: cannot save the checkpoint ({getattr(error, 'strerror', None) or error}{room}); {kept}"
            ) from error
        self._own.add(path)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint that is what was written.

        Raises:
            CheckpointError: if its SHA-256 says that it is not.
        """
        if Path(path).is_file():
            verify(path)
        return super().load_checkpoint(path, *args, **options)
