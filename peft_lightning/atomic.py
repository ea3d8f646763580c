"""Write files so that a reader sees the old content or the new one, never a part: also after a crash."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from peft_lightning.errors import UsageError

__all__ = ["atomic_write", "fresh_folder"]


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, then rename it over ``path``.

    Args:
        path: the file to replace; its folder is made if needed.
        write: receives a binary file open for writing.

    Raises:
        OSError: if the disk refuses; ``path`` then still holds what it held, and the temporary file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when all is written, and is gone if anything fails.

    Args:
        folder: new or empty. Its parents are made if needed. Only files are written into it, no folders.

    Raises:
        UsageError: if ``folder`` holds files or is one.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"out = {folder}: exists already and is not empty; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        if temporary.exists():
            for path in temporary.iterdir():
                path.unlink()
            temporary.rmdir()
