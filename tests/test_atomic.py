"""A file is old or new, never half, and a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from peft_lightning.atomic import atomic_write, atomic_write_together, fresh_folder, lock_file
from peft_lightning.errors import UsageError


def test_replaces_the_content(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    atomic_write(target, lambda file: file.write(b"one"))
    atomic_write(target, lambda file: file.write(b"two"))
    assert target.read_bytes() == b"two"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, fail)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """As on a file system of several machines, where process numbers repeat."""
    target = tmp_path / "file"

    def outer(file: BinaryIO) -> None:
        file.write(b"outer")
        atomic_write(target, lambda inner: inner.write(b"inner"))
        assert target.read_bytes() == b"inner"

    atomic_write(target, outer)
    assert target.read_bytes() == b"outer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with fresh_folder(target) as fresh:
        (fresh / "file").write_text("one")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with fresh_folder(tmp_path / "empty") as fresh:
        (fresh / "file").write_text("one")
    assert (tmp_path / "empty" / "file").exists()


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), fresh_folder(tmp_path / "folder") as fresh:
        (fresh / "file").write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="exists already and is not empty"), fresh_folder(target):
            raise AssertionError("not reached")


def test_files_that_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_together(tmp_path / "new", {"one": b"1", "two": b"2"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {"one": b"1", "two": b"2"}
    flush, left = os.fsync, iter([True])

    def full(handle: int) -> None:
        if not next(left, False):
            raise OSError(28, "No space left on device")
        flush(handle)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_together(tmp_path / "new", {"one": b"3", "two": b"4"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {"one": b"1", "two": b"2"}


def test_an_existing_folder_is_filled_and_its_configuration_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    inode = target.stat().st_ino
    with fresh_folder(target) as fresh:
        for name in ("adapter_config.json", "z.safetensors"):
            (fresh / name).write_text(name)
    assert {path.name for path in target.iterdir()} == {"adapter_config.json", "z.safetensors"}
    assert target.stat().st_ino == inode  # a shell in it stays in it
    other = tmp_path / "other"
    other.mkdir()
    replace = Path.replace

    def refuse(source: Path, to: Path) -> Path:
        if source.name == "adapter_config.json":
            assert (other / "z.safetensors").exists()
            raise PermissionError(13, "no")
        return replace(source, to)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError, match="no"), fresh_folder(other) as fresh:
        for name in ("adapter_config.json", "z.safetensors"):
            (fresh / name).write_text(name)
    assert not list(other.iterdir())


def test_links_to_nowhere_and_in_circles(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with fresh_folder(tmp_path / "link") as fresh:
        (fresh / "file").write_text("one")
    assert (tmp_path / "nowhere" / "file").exists() and (tmp_path / "link").is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="loop: exists already"), fresh_folder(tmp_path / "loop"):
        raise AssertionError("not reached")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="out = .*file/new: cannot be made"), fresh_folder(tmp_path / "file" / "new"):
        pass


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_process_left_is_in_nobodys_way_and_goes_when_it_is_old(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "out (1)"
    if exists:
        target.mkdir()
    for age in (0.0, 2 * 24 * 3600.0):
        process = multiprocessing.get_context("spawn").Process(target=_killed, args=(target,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (left,) = (target if exists else tmp_path).glob(".*.tmp")
        os.utime(left, (time.time() - age,) * 2)
        with fresh_folder(target) as fresh:
            (fresh / "file").write_text("whole")
        assert (target / "file").read_text() == "whole" and left.exists() == (age == 0)
        (target / "file").unlink()
        shutil.rmtree(left, ignore_errors=True)
        if not exists:
            target.rmdir()


def _killed(target: Path) -> None:
    with fresh_folder(target) as fresh:
        (fresh / "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_stale_files_of_that_name_only(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    names = [f".file.{digits}.tmp", f".other.{digits}.tmp", f".file.{digits}.tmp.old", ".file.ghost.tmp"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", *names[1:]}


def test_two_writers_of_one_empty_folder(tmp_path: Path) -> None:
    """The second to end is refused, and leaves the first one's files."""
    with pytest.raises(UsageError, match="exists already and is not empty"), fresh_folder(tmp_path) as slow:
        (slow / "file").write_text("slow")
        with fresh_folder(tmp_path) as quick:
            (quick / "file").write_text("quick")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "quick"


def test_a_lock_in_a_strange_folder(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    (tmp_path / "link").symlink_to(precious)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name in ("link", "dangling", "."):
        with pytest.raises(OSError):
            lock_file(tmp_path / name)
    assert precious.read_text() == "x" and not (tmp_path / "new").exists()
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "file", "file"):  # none of them waits
        with lock_file(tmp_path / name) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with lock_file(tmp_path / name) as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    """And not the temporary one, of which nobody knows."""

    def full(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'x'}'$"):
        atomic_write(tmp_path / "x", full)
    assert not list(tmp_path.iterdir())
