"""A checkpoint's SHA-256, at its own end, so that it stays with the file whatever it is renamed to or copied as.

A checkpoint is a ZIP archive, whose readers look for its directory from the end on and pass over what follows it: so
`torch.load` reads the file as it is. It checks no sum by itself, and a flipped bit would become another weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from peft_lightning.errors import CheckpointError
from peft_lightning.reading.limits import regular_size

__all__ = ["sum_of", "verify", "write_summed"]

_MARK = b"\npeft_lightning sha256 "
_LENGTH = len(_MARK) + 64
_CHUNK = 1 << 20  # bytes


class _Summed:
    """A file open for writing that sums up what goes into it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sum.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_summed(file: BinaryIO, write: Callable[[Any], object]) -> None:
    """Let ``write`` fill ``file`` from its beginning to its end, and put the SHA-256 of that after it.

    Args:
        file: open for writing, and empty.
        write: receives what has ``write`` and ``flush``, and no ``seek``.
    """
    summed = _Summed(file)
    write(summed)
    file.write(_MARK + summed.sum.hexdigest().encode())


def sum_of(path: str | Path) -> str:
    """The SHA-256 at a file's end, in hexadecimal digits, not compared with the file; empty where it has none."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _LENGTH))
        end = file.read()
    return end[len(_MARK) :].decode() if end.startswith(_MARK) else ""


def verify(path: str | Path) -> bool:
    """Compare a file with the SHA-256 at its end.

    Returns:
        True: they agree; False: the file has none, as one that another program or an older version wrote.

    Raises:
        CheckpointError: if they differ, or the file cannot be read.
    """
    try:
        left = regular_size(Path(path)) - _LENGTH
        with open(path, "rb") as file:
            file.seek(max(0, left))
            end = file.read()
            if left < 0 or not end.startswith(_MARK):
                return False
            file.seek(0)
            found = hashlib.sha256()
            while left and (data := file.read(min(left, _CHUNK))):
                found.update(data)
                left -= len(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if found.hexdigest().encode() != end[len(_MARK) :]:
        raise CheckpointError(f"{path}: damaged (its SHA-256 is not the one at its end)")
    return True
