"""``doctor`` says what is there, what would not work, and ends with 1 if something that is needed is broken."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.cli.main import main
from tests.cli.test_bad_input import fails


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_LIGHTNING_DATA", raising=False)


def test_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PEFT_LIGHTNING_CACHE", str(tmp_path / "not" / "made"))
    (tmp_path / "data" / "mrpc").mkdir(parents=True)
    main(["doctor", "--data_root", str(tmp_path / "data")])
    lines = capsys.readouterr().out.splitlines()
    found = {line[:20].strip(): line[20:] for line in lines if line[:1] != " "}
    assert found["torch"] == metadata.version("torch") and found["transformers"] == metadata.version("transformers")
    assert found["cache"].startswith(str(tmp_path / "not" / "made")) and "GiB free" in found["cache"]
    assert {"GPUs", "bfloat16", "torch.compile", "flash attention", "hub's cache", "working folder"} <= found.keys()
    assert found["data"] == f"{tmp_path / 'data'}: 1 folders"
    assert lines[-1] == "all that is needed works"
    assert not (tmp_path / "not").exists()


def test_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(["doctor", "--data_root", str(tmp_path / "ghost")], capsys)
    assert status == 1 and "1 broken: data: there is no such folder; give another one" in line
    with monkeypatch.context() as patch:

        def closed(path: Path) -> Any:
            raise PermissionError(13, "Permission denied", str(path))

        patch.setattr(Path, "iterdir", closed)
        status, line = fails(["doctor", "--data_root", str(tmp_path)], capsys)
        assert status == 1 and "data: cannot be looked into (Permission denied); change its rights, or give" in line
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20))
        status, line = fails(["doctor"], capsys)
        assert (
            status == 1
            and "cache: less than 2 GiB free; make room, or name another folder by $PEFT_LIGHTNING_CACHE" in line
        )
    (tmp_path / "file").touch()
    _, line = fails(["doctor", "--data_root", str(tmp_path / "file")], capsys)
    assert "data: is a file; give the folder that holds those of the tasks" in line
    with monkeypatch.context() as patch:
        patch.setenv("PEFT_LIGHTNING_CACHE", str(tmp_path / "file" / "cache"))
        status, line = fails(["doctor"], capsys)
        assert status == 1 and f"cache: {tmp_path / 'file'} cannot be written to (not a directory)" in line
        patch.setenv("PEFT_LIGHTNING_CACHE", "/proc/cache")  # where the rights alone say that all is well
        status, line = fails(["doctor"], capsys)
        assert status == 1 and "cache: /proc cannot be written to" in line
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name, value in (
        ("PEFT_LIGHTNING_CACHE", str(tmp_path / "a")),
        ("PEFT_LIGHTNING_CACHE", "/tmp/" + "x" * 5000),
        ("HF_HOME", "~nobodyatall/x"),
        ("HF_HUB_CACHE", str(tmp_path / "file")),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            status, line = fails(["doctor"], capsys)
            assert status == 1 and "1 broken: " in line and f"${name}" in line
    with monkeypatch.context() as patch:
        patch.setattr(os, "getcwd", lambda: os.stat(tmp_path / "gone"))
        status, line = fails(["doctor"], capsys)
        assert status == 1 and "working folder: " in line and "name another folder by --run_dir" in line
    real = metadata.version

    def version(name: str) -> str:
        if name == "datasets":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", version)
        status, line = fails(["doctor"], capsys)
        assert status == 1 and "datasets: pip install datasets" in line


def test_what_only_would_not_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "note: there is no C++ compiler (g++): install one" in shown
    assert "note: torch is built for CUDA 13.0 and sees no device; look at nvidia-smi" in shown
    assert "all that is needed works" in shown
