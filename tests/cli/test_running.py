"""Two processes do not train into one folder, and those of one job begin with the same file."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from peft_lightning.cli.running import Agreed, Held
from peft_lightning.errors import PeftLightningError, UsageError
from tests.cli.test_bad_input import FIT, fails

FIRST: Any = SimpleNamespace(is_global_zero=True)


def locked(folder: Path) -> Any:
    """The folder's lock, taken by an open file of its own, as another process's is."""
    file = (folder / ".lock").open("ab")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@pytest.mark.parametrize("end", ["teardown", "on_exception"])
def test_one_has_it_until_its_end(end: str, tmp_path: Path) -> None:
    held = Held(tmp_path / "run", 0.1)
    held.setup(FIRST, FIRST, "fit")
    with pytest.raises(BlockingIOError):
        locked(tmp_path / "run")
    for begin in (lambda one: one.setup(FIRST, FIRST, "fit"), Held.take):
        with pytest.raises(UsageError, match="--run_dir = .*run: another process trains into it"):
            begin(Held(tmp_path / "run", 0.1))
    Held(tmp_path / "run", 0.1).setup(SimpleNamespace(is_global_zero=False), FIRST, "fit")  # type: ignore[arg-type]
    getattr(held, end)(FIRST, FIRST, "fit")
    locked(tmp_path / "run").close()


def test_one_that_ends_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = locked(tmp_path)
    threading.Timer(0.5, other.close).start()
    held = Held(tmp_path, 2.0)
    held.take()
    held.setup(FIRST, FIRST, "fit")  # has it
    assert other.closed
    assert capsys.readouterr().err.count("waits for its end") == 1
    held.release()


def test_where_there_are_no_locks_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    Held(tmp_path, 0.1).setup(FIRST, FIRST, "fit")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Held.__init__, "__defaults__", (0.1,))
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        status, line = fails([*FIT, "--run_dir", str(folder)], capsys)
        assert status == 2 and f"--run_dir = {folder}: another process trains into it" in line
        status, line = fails([*FIT, "--run_dir", str(folder), "--resume", "auto"], capsys)
        assert status == 2 and f"--run_dir = {folder}: another process trains into it" in line
    locked(folder).close()  # nobody has kept it


@pytest.mark.parametrize("name", ["one.ckpt", "adapter", None])
def test_processes_that_found_the_same_agree(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter").mkdir()
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "one.ckpt")
    path = tmp_path / name if name else None

    def gather(found: list[Any], own: Any) -> None:
        found[:] = [own, own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    two: Any = SimpleNamespace(world_size=2)
    Agreed(path).setup(two, two, "test")


@pytest.mark.parametrize("name", [".lock", ""])
def test_a_folder_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    place = tmp_path / "run"
    if name:
        place.mkdir()
        (place / name).symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("a file")
    with pytest.raises(PeftLightningError, match=f"--run_dir = {place}: cannot be written to"):
        Held(place).setup(FIRST, FIRST, "fit")
