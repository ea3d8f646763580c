"""Records round-trip, are written whole or not at all, and refuse what JSON cannot hold."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.errors import DataError, UsageError
from peft_lightning.study import records
from peft_lightning.study.records import RunRecord, environment, read_record, write_record


def _record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "name": "full-seed0",
        "status": "finished",
        "config": {"lr": 1e-4, "betas": [0.9, 0.999]},
        "data": {"task": "mrpc", "rows": 3668},
        "model": {"name": "tiny"},
        "seeds": {"run": 0},
        "environment": {"commit": None, "dirty": True},
        "results": {"accuracy": 0.8},
        "series": {"val/accuracy": [0.7, 0.8]},
    }
    return RunRecord(**(values | changes))


def test_round_trip(tmp_path: Path) -> None:
    path = write_record(tmp_path / "deep" / "run.json", _record())
    assert read_record(path) == _record()
    assert os.listdir(path.parent) == ["run.json"]


def test_tuples_and_tensors_become_plain(tmp_path: Path) -> None:
    record = _record(config={"betas": (0.9, 0.999)}, results={"loss": torch.tensor(0.5)})
    values = json.loads(write_record(tmp_path / "run.json", record).read_text())
    assert values["config"] == {"betas": [0.9, 0.999]}
    assert values["results"] == {"loss": 0.5}


def test_environment_says_what_ran() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert isinstance(found["dirty"], bool)
    assert found["device"]["threads"] == torch.get_num_threads()
    json.dumps(found, allow_nan=False)


def test_a_source_change_is_dirty_and_a_result_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "peft_lightning" / "study" / "records.py"
    result = tmp_path / "benchmarks" / "results" / "run.json"
    for path in (source, result):
        path.parent.mkdir(parents=True)
    source.write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(source))
    result.write_text("{}")
    assert environment()["dirty"] is False
    source.write_text("changed")
    found = environment()
    assert found["dirty"] is True
    assert len(found["commit"]) == 40


def test_without_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "__file__", str(tmp_path / "peft_lightning" / "study" / "records.py"))
    (tmp_path / "peft_lightning" / "study").mkdir(parents=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = environment()
    assert found["commit"] is None
    assert found["dirty"] is True


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = write_record(tmp_path / "run.json", _record())
    with pytest.raises(DataError, match="run.json: the record 'full-seed0' cannot be written as JSON: nan"):
        write_record(path, _record(results={"accuracy": float("nan")}))
    assert read_record(path) == _record()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(tmp_path / "run.json", _record())

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_record(path, dataclasses.replace(_record(), name="other"))
    assert read_record(path) == _record()
    assert os.listdir(tmp_path) == ["run.json"]


def test_unknown_status() -> None:
    with pytest.raises(UsageError, match="status is 'done': it must be 'finished' or 'failed'"):
        _record(status="done")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"unknown": 1}'])
def test_a_file_without_a_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(DataError, match="run.json holds no run record with the fields"):
        read_record(path)
