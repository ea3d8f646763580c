"""The last checkpoint, the one before where the last is damaged, one clear line where both are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from peft_lightning.errors import CheckpointError
from peft_lightning.files.latest import is_whole, latest_checkpoint


def content(number: int) -> dict[str, Any]:
    manifest = {"format": 2, "class": "x", "hyper_parameters": {}}
    return {"state_dict": {"a": torch.full((9,), float(number))}, "peft_lightning": manifest}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()  # a second name of the same file stays as it is
    path.write_bytes(data)


def number(path: Path | None) -> float:
    assert path is not None
    return float(torch.load(path, weights_only=True)["state_dict"]["a"][0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plugin = AtomicCheckpointIO()
    for step in (1, 2, 3):
        plugin.save_checkpoint(content(step), tmp_path / "last.ckpt")
    return tmp_path


def test_the_one_before_is_kept(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert latest_checkpoint(folder) == (folder / "last.ckpt", "")
    assert (number(folder / "last.ckpt"), number(folder / "previous.ckpt")) == (3, 2)
    AtomicCheckpointIO().save_checkpoint(content(7), folder / "best.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(8), folder / "best.ckpt")
    assert number(folder / "previous.ckpt") == 2


@pytest.mark.parametrize("damage", ["flipped", "half", "empty", "missing"])
def test_a_damaged_one_gives_way_to_the_one_before(folder: Path, damage: str) -> None:
    last, before = folder / "last.ckpt", folder / "previous.ckpt"
    if damage == "flipped":
        flip(last)
    else:
        half = last.read_bytes()[: last.stat().st_size // 2 if damage == "half" else 0]
        last.unlink()
        if damage != "missing":
            last.write_bytes(half)
    path, said = latest_checkpoint(folder)
    assert number(path) == 2
    what = "is missing" if damage == "missing" else "is damaged (truncated, or its SHA-256 is another)"
    assert said == f"{last} {what}: the run goes on from the one before, {before}"
    # the next save must not put the damaged one in the place of the good one
    AtomicCheckpointIO().save_checkpoint(content(9), last)
    assert (number(last), number(before)) == (9, 2)


def test_both_are_damaged(folder: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        flip(folder / name)
    with pytest.raises(CheckpointError, match=r"last.ckpt and .*previous.ckpt: both are damaged"):
        latest_checkpoint(folder)
    (folder / "previous.ckpt").unlink()
    with pytest.raises(CheckpointError, match="last.ckpt: damaged, and there is no other one"):
        latest_checkpoint(folder)
    (folder / "last.ckpt").unlink()
    assert latest_checkpoint(folder) == (None, "") and not is_whole(folder / "last.ckpt")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    plugin = AtomicCheckpointIO()
    for step in (1, 2):
        plugin.save_checkpoint(content(step), tmp_path / "last.ckpt")
    assert (number(tmp_path / "last.ckpt"), number(tmp_path / "previous.ckpt")) == (2, 1)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == "last.ckpt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        plugin.save_checkpoint(content(3), tmp_path / "last.ckpt")
    assert number(latest_checkpoint(tmp_path)[0]) == 2
