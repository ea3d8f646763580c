"""Write files so that a reader sees the old content or the new one, never a part: also after a crash.

What is being written is called ``.NAME.<32 hex digits>.tmp``. A process that is killed leaves it behind: it is in
nobody's way, and the next write of that name a day later removes it. Only then, for who else may be writing, on which
machine, cannot be known.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from peft_lightning.errors import UsageError

__all__ = ["atomic_write", "atomic_write_together", "fresh_folder", "lock_file"]

_LAST = ("adapter_config.json", "manifest.json")
_STALE = 24 * 3600  # seconds


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object], *, keep: str | None = None) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, then rename it over ``path``.

    Args:
        path: the file to replace; its folder is made if needed.
        write: receives a binary file open for writing.
        keep: the name beside ``path`` under which what it held stays; None: it goes.

    Raises:
        OSError: if the disk refuses; ``path`` then still holds what it held, and the temporary file is gone.
    """
    path = Path(path)
    temporary = _written(path, write)
    try:
        if keep is not None and path.exists():
            _keep(path, path.with_name(keep))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def atomic_write_together(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Replace several files of a folder: all are on the disk before the first takes its place.

    Args:
        folder: made if needed.
        contents: file name -> content. The last one must be such that a reader notices if the others do not belong to
            it: files take their places one after another, in this order.

    Raises:
        OSError: if the disk refuses; what the folder held is then untouched.
    """
    folder = Path(folder)
    written: dict[Path, Path] = {}
    try:
        for name, content in contents.items():
            written[folder / name] = _written(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
        for path, temporary in written.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(folder)


def lock_file(path: str | Path) -> BinaryIO:
    """Open a file, made if needed, that is only locked: in a folder of someone else's it may be anything.

    A link is not followed, and a pipe does not keep whoever opens it.

    Args:
        path: of the file; its folder is there.

    Raises:
        OSError: it cannot be made, or it is a link or a folder.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


@contextmanager
def fresh_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder whose files take their places in ``folder`` when all are written.

    They are all gone if anything fails. A folder that does not exist appears whole. Into an existing one, which may be
    the current one or behind a link, the files are moved one by one, ``adapter_config.json`` or ``manifest.json`` last:
    before that it cannot be read.

    Args:
        folder: new or empty, but for what a killed process left. Its parents are made if needed. Only files are
            written into it, no folders.
        replace: whether a folder with files gives way. It is moved aside before the new one takes its place, and then
            deleted, so that a reader sees the old folder, or the new one, or for a moment none.

    Raises:
        UsageError: if ``folder`` is a file, holds files and may not be replaced, or cannot be made.
    """
    given, folder = folder, Path(os.path.realpath(folder))
    exists = os.path.lexists(folder) and not (replace and folder.is_dir())
    if exists:
        _refuse_used(folder, given)
    parent = folder if exists else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(parent, folder.name)
        temporary.mkdir()
    except OSError as error:
        raise UsageError(f"out = {given}: cannot be made ({error.strerror}: {error.filename})") from error
    moved: list[Path] = []
    try:
        yield temporary
        if exists:
            _refuse_used(folder, given)  # by another process, meanwhile
        else:
            _take_place(temporary, folder)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name in _LAST) if exists else ():
            moved.append(folder / path.name)
            path.replace(moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    finally:
        if temporary.exists():
            for path in temporary.iterdir():
                path.unlink()
            temporary.rmdir()


def _refuse_used(folder: Path, given: str | Path) -> None:
    """Raise UsageError where a folder is none, or holds more than what is being written."""
    if not folder.is_dir() or set(folder.iterdir()) - set(_left(folder, folder.name)):
        raise UsageError(f"out = {given}: exists already and is not empty; name a new folder")


def _take_place(temporary: Path, folder: Path) -> None:
    """Rename a folder over another one, which is deleted."""
    if not folder.exists():
        temporary.replace(folder)
        return
    aside = folder.with_name(f"{temporary.name}.old")
    folder.replace(aside)
    try:
        temporary.replace(folder)
    except BaseException:
        aside.replace(folder)
        raise
    shutil.rmtree(aside)


def _written(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """A temporary file beside ``path``, full and flushed to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent, path.name)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # of the file that everybody knows
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return temporary


def _keep(path: Path, kept: Path) -> None:
    """Give a file a second name, which may be another file's; where the file system knows no links, only that one."""
    link = _temporary(kept.parent, kept.name)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, kept)
        return
    os.replace(link, kept)


def _left(folder: Path, name: str) -> list[Path]:
    """What is being written under a name, or was by a process that was killed."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{32}}\.tmp")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def _temporary(folder: Path, name: str) -> Path:
    """A new path to write under; stale ones of the same name go."""
    for path in _left(folder, name):
        with suppress(OSError):  # another process may be as quick
            if time.time() - path.lstat().st_mtime > _STALE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / f".{name}.{uuid.uuid4().hex}.tmp"


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
