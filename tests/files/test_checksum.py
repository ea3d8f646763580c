"""A checkpoint's SHA-256 at its end: torch reads the file as ever, and every flipped bit is found."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch

from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from peft_lightning.errors import CheckpointError
from peft_lightning.files.checksum import verify
from peft_lightning.files.latest import is_whole
from peft_lightning.files.manifest import read_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    manifest = {"format": 2, "class": "x", "hyper_parameters": {}}
    content = {"state_dict": {"a": torch.arange(50.0)}, "peft_lightning": manifest, "n": [1, "two"]}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


def test_the_sum_is_that_of_what_stands_before_it(path: Path) -> None:
    content = path.read_bytes()
    payload, _, digest = content.rpartition(b"\npeft_lightning sha256 ")
    assert hashlib.sha256(payload).hexdigest().encode() == digest
    assert verify(path)
    renamed = path.rename(path.with_name("two.ckpt"))
    assert verify(renamed)
    for mmap in (False, True):
        loaded = torch.load(renamed, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["a"], torch.arange(50.0)) and loaded["n"] == [1, "two"]
    assert zipfile.ZipFile(renamed).testzip() is None


def test_every_byte_counts(path: Path) -> None:
    """Whatever is flipped: damage that is said, or a mark that is gone from a file that is as it was."""
    good, whole = path.read_bytes(), torch.load(path, weights_only=True)["state_dict"]["a"]
    found = 0
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            assert torch.equal(read_file(path)["state_dict"]["a"], whole), place
        except CheckpointError:
            found += 1
    assert found >= len(range(0, len(good) - 87, 7))
    path.write_bytes(good)
    assert torch.equal(read_file(path)["state_dict"]["a"], whole)


def test_half_a_file(path: Path) -> None:
    good = path.read_bytes()
    for length in (0, 10, 100, len(good) // 2, len(good) - 200):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="one.ckpt: damaged, truncated or not a checkpoint"):
            read_file(path)


def test_the_trainer_reads_no_damaged_file(path: Path) -> None:
    good = bytearray(path.read_bytes())
    place = good.index(torch.arange(50.0).numpy().tobytes())
    good[place + 9] ^= 1  # another weight, which torch reads without a word
    path.write_bytes(good)
    assert not torch.equal(torch.load(path, weights_only=True)["state_dict"]["a"], torch.arange(50.0))
    with pytest.raises(CheckpointError, match="damaged .its SHA-256 is not the one at its end"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(CheckpointError, match="damaged .its SHA-256 is not the one at its end"):
        read_file(path)


def test_files_without_a_sum(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    assert not verify(tmp_path / "other.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "other.ckpt", weights_only=True) == {"a": 1}


def test_what_is_no_ordinary_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path, message in (
        (tmp_path, "is a folder"),
        *((tmp_path / n, "is no ordinary file") for n in ("pipe", "zeros")),
    ):
        with pytest.raises(CheckpointError, match=f"{path}: cannot be read .{message}"):
            verify(path)
        assert not is_whole(path)
