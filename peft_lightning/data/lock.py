"""One process builds a file, the others wait and read it: also on other nodes, where they share the file system."""

from __future__ import annotations

import fcntl
import glob
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from peft_lightning.atomic import atomic_write, lock_file
from peft_lightning.errors import DataError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def build_once(path: Path, read: Callable[[Path], _T], build: Callable[[BinaryIO], object]) -> _T:
    """Return what ``read`` makes of the file ``path``, which ``build`` writes if it is missing or damaged.

    What a builder that was killed left behind is deleted before another one builds.

    Args:
        path: its folder is made if needed.
        read: raises ValueError or OSError if the file is damaged.
        build: writes the content; the file appears when all is written, or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        return read(path)
    except (ValueError, OSError):
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(path) as alone:
            # Another process may have built it meanwhile.
            try:
                return read(path)
            except FileNotFoundError:
                pass
            except (ValueError, OSError) as error:
                _log.warning("the cached file %s is damaged and is built again: %s", path, error)
            if alone:
                # Whoever wrote them held this lock, and was killed.
                for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            atomic_write(path, build)
        return read(path)
    except OSError as error:
        raise DataError(f"cache_dir {str(path.parent)!r} cannot be written: {error.strerror or error}") from error


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold the lock of a file beside ``path``, and say whether that worked; it ends with the block, or the process.

    Some file systems of clusters know no locks. There, each process builds; since files appear whole, they are right
    all the same.
    """
    with lock_file(path.with_name(f"{path.name}.lock")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError as error:
            locked = False
            _log.warning("%s cannot be locked, so that several processes may do the same work: %s", path, error)
        # Closing the file ends the lock.
        yield locked
