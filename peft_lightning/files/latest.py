"""Which checkpoint a run goes on from: its last one, or the one before where the last one is damaged."""

from __future__ import annotations

from pathlib import Path

from peft_lightning.errors import CheckpointError
from peft_lightning.files.checksum import verify
from peft_lightning.files.manifest import read_file

__all__ = ["LAST", "PREVIOUS", "is_whole", "latest_checkpoint"]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint is there and undamaged, by its SHA-256; without one, by reading all of it."""
    try:
        if not Path(path).exists():
            return False
        if not verify(path):
            read_file(path)
    except CheckpointError:
        return False
    return True


def latest_checkpoint(folder: str | Path) -> tuple[Path | None, str]:
    """The newest undamaged checkpoint of a run's folder.

    Returns:
        It, or None where there is no checkpoint at all; and what has to be said about it, or nothing.

    Raises:
        CheckpointError: if there are checkpoints, and all are damaged.
    """
    last, previous = Path(folder) / LAST, Path(folder) / PREVIOUS
    there = [path for path in (last, previous) if path.exists()]
    if not there:
        return None, ""
    if is_whole(last):
        return last, ""
    what = "is damaged (truncated, or its SHA-256 is another)" if last in there else "is missing"
    if is_whole(previous):
        return previous, f"{last} {what}: the run goes on from the one before, {previous}"
    if len(there) == 1:
        raise CheckpointError(f"{there[0]}: damaged, and there is no other one to go on from; use another --run_dir")
    raise CheckpointError(
        f"{last} and {previous}: both are damaged, there is nothing to go on from; use another --run_dir"
    )
