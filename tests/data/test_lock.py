"""Building a file once."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, BinaryIO

import pytest

from peft_lightning.data.lock import build_once
from peft_lightning.errors import DataError


def read(path: Path) -> str:
    """The content, which starts with a capital letter."""
    content = path.read_text()
    if not content[:1].isupper():
        raise ValueError("it is small")
    return content


def refuse(_: BinaryIO) -> None:
    """Build nothing: the file has to do."""
    raise AssertionError("it was built again")


def test_what_is_there_is_not_built(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    assert build_once(path, read, lambda file: file.write(b"Content")) == "Content"
    assert build_once(path, read, refuse) == "Content"
    assert {entry.name for entry in path.parent.iterdir()} == {"file", "file.lock"}


def test_damaged_file_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    assert build_once(path, read, lambda file: file.write(b"Content")) == "Content"
    assert f"the cached file {path} is damaged and is built again: it is small" in caplog.text
    assert len(caplog.records) == 1


def test_the_others_wait_and_read(tmp_path: Path) -> None:
    # Locks are between open files, so threads compete as processes do.
    built, together = [], Barrier(8)

    def build(file: BinaryIO) -> None:
        time.sleep(0.05)
        built.append(1)
        file.write(b"Content")

    def work(_: int) -> str:
        together.wait()
        return build_once(tmp_path / "file", read, build)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == ["Content"] * 8
    assert len(built) == 1


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def full(file: BinaryIO) -> None:
        file.write(b"Con")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match=r"cache_dir '.*' cannot be written: .*No space left on device"):
        build_once(tmp_path / "file", read, full)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.lock"]
    # Who comes later does not wait for the one that failed.
    assert build_once(tmp_path / "file", read, lambda file: file.write(b"Content")) == "Content"


def leftovers(folder: Path) -> set[str]:
    """What builders of three files left, of which one was called much like ours."""
    names = {f".{name}.0123.tmp" for name in ("file", "file2", "[f]ile")}
    for name in names:
        (folder / name).write_bytes(b"Con")
    return names


@pytest.mark.parametrize("name", ["file", "[f]ile"])
def test_what_a_killed_builder_left_is_deleted(tmp_path: Path, name: str) -> None:
    left = leftovers(tmp_path)
    built = []

    def build(file: BinaryIO) -> None:
        built.append({path.name for path in tmp_path.glob(f".{glob.escape(name)}.*.tmp")})
        file.write(b"Content")

    build_once(tmp_path / name, read, build)
    assert len(built[0]) == 1 and not built[0] & left, "before the next one needs the room"
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.lock", *left} - {f".{name}.0123.tmp"}


def test_a_killed_process_leaves_nothing_for_ever(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from peft_lightning.data.lock import build_once
def build(file):
    file.write(b"Con")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
build_once(Path(sys.argv[1]), Path.read_text, build)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], timeout=60)
    assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
    assert build_once(tmp_path / "file", read, lambda file: file.write(b"Content")) == "Content"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "file.lock"}


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match=r"cache_dir '.*taken' cannot be written"):
        build_once(tmp_path / "taken" / "file", read, refuse)


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = leftovers(tmp_path)
    monkeypatch.setattr(fcntl, "flock", unknown)
    assert build_once(tmp_path / "file", read, lambda file: file.write(b"Content")) == "Content"
    # It may be another process's, which is alive.
    assert left <= {path.name for path in tmp_path.iterdir()}
    assert "file cannot be locked, so that several processes may do the same work: " in caplog.text


def test_folder_that_may_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("Content")

    def forbidden(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    monkeypatch.setattr(fcntl, "flock", forbidden)
    assert build_once(tmp_path / "file", read, refuse) == "Content"
