"""Reading is safe and strict, and says what differs."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.errors import CheckpointError
from peft_lightning.files.manifest import FORMAT, MANIFEST_KEY, read_file, write_adapter

SELF = {"format": FORMAT, "class": "some.Method", "hyper_parameters": {}}

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.mask": torch.tensor([[True, False]])}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", TENSORS, {**SELF, "class": "x"})
    return tmp_path / "adapter"


def checkpoint(path: Path, **content: Any) -> Path:
    torch.save({"state_dict": TENSORS, MANIFEST_KEY: SELF, **content}, path)
    return path


def test_an_adapter_comes_back_exactly(adapter: Path) -> None:
    content = read_file(adapter)
    assert content[MANIFEST_KEY]["class"] == "x"
    for name, tensor in TENSORS.items():
        assert torch.equal(content["state_dict"][name], tensor)
        assert content["state_dict"][name].dtype == tensor.dtype


@pytest.mark.parametrize("file", ["adapter.safetensors", "manifest.json"])
def test_a_damaged_adapter(adapter: Path, file: str) -> None:
    whole = (adapter / file).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        if file == "manifest.json" and json_equal(damaged, whole):
            continue
        (adapter / file).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or incomplete adapter"):
            read_file(adapter)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_a_missing_tensor_file(adapter: Path) -> None:
    (adapter / "adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="damaged or incomplete adapter"):
        read_file(adapter)


@pytest.mark.parametrize("full", ["adapter.safetensors", "manifest.json"])
def test_a_full_disk_leaves_the_old_adapter(adapter: Path, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    flush, calls = os.fsync, iter(["adapter.safetensors", "manifest.json"])

    def no_space(handle: int) -> None:
        if next(calls) == full:
            raise OSError(28, "No space left on device")
        flush(handle)

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(adapter, {"a.weight": torch.ones(3)}, SELF)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_an_adapter_that_was_replaced_by_half_cannot_be_read(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(adapter, {"a.weight": torch.ones(3)}, SELF)
    with pytest.raises(CheckpointError, match="damaged or incomplete adapter .the SHA-256"):
        read_file(adapter)
    assert {path.name for path in adapter.iterdir()} == {"adapter.safetensors", "manifest.json"}


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "last.ckpt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged, truncated or not a checkpoint"):
        read_file(path)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(CheckpointError, match="damaged, truncated or not a checkpoint"):
        read_file(path)
    assert not (tmp_path / "ran").exists()


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_file(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match=r"holds no best\.ckpt"):
        read_file(tmp_path)
    with pytest.raises(CheckpointError, match="was not written by peft_lightning"):
        read_file(checkpoint(tmp_path / "foreign.ckpt", **{MANIFEST_KEY: None}))
    with pytest.raises(CheckpointError, match="format 1 is not the format 2.*use the version of peft_lightning that"):
        read_file(checkpoint(tmp_path / "old.ckpt", **{MANIFEST_KEY: {"format": 1}}))
    for wrong in ("2", True, 2.0, None):
        with pytest.raises(CheckpointError, match=f"format {wrong!r} is not the format 2"):
            read_file(checkpoint(tmp_path / "typed.ckpt", **{MANIFEST_KEY: {**SELF, "format": wrong}}))
    with pytest.raises(CheckpointError, match="format 99 is not the format"):
        read_file(checkpoint(tmp_path / "future.ckpt", **{MANIFEST_KEY: {"format": 99}}))


def test_a_runs_folder_gives_the_best_checkpoint_before_the_last(tmp_path: Path) -> None:
    checkpoint(tmp_path / "last.ckpt", which="last")
    assert read_file(tmp_path)["which"] == "last"
    checkpoint(tmp_path / "best.ckpt", which="best")
    assert read_file(tmp_path)["which"] == "best"
