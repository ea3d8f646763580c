"""The MRPC benchmark end to end on toy data, and its table from records made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mrpc
from benchmarks.mrpc_table import mrpc_table
from peft_lightning.errors import DataError, UsageError
from peft_lightning.study.records import RunRecord, read_record


def _record(arm: str, seed: int, accuracy: float) -> RunRecord:
    return RunRecord(
        name=f"{arm}-seed{seed}",
        status="finished",
        config={},
        data={"task": "mrpc", "train_rows": 3668, "validation_rows": 408},
        model={"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384},
        seeds={"module": seed, "data": seed},
        environment={
            "commit": "a" * 40,
            "dirty": False,
            "versions": {"torch": "2", "transformers": "5"},
            "device": {"kind": "cpu", "name": "a processor", "threads": 2},
        },
        results={
            "accuracy": accuracy,
            "f1": 0.9,
            "majority": 0.684,
            "seconds_per_step": 0.5 if arm == "full" else 0.25,
            "trained_parameters": 1000.0,
            "head_parameters": 100.0,
            "kept_share": 0.6,
        },
    )


def test_table() -> None:
    records = {
        "full": [_record("full", seed, accuracy) for seed, accuracy in enumerate((0.80, 0.81, 0.82))],
        "snip40": [_record("snip40", seed, accuracy) for seed, accuracy in enumerate((0.81, 0.82, 0.83))],
    }
    table, _, context = mrpc_table(records).partition("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    row = dict(zip(lines[0], lines[3], strict=True))
    assert row["accuracy"] == "0.820 ± 0.025"
    assert row["accuracy over full"] == "0.010 ± 0.000"
    assert row["trained parameters"] == "900 + head 100"
    assert row["kept share"] == "60.0%"
    assert row["step over full"] == "0.50"
    assert lines[-1][:3] == ["majority class", "", "0.684"]
    assert "Seeds 0, 1, 2" in context
    assert "commit aaaaaaaaaaaa." in context
    assert "Failed setup" not in context


def test_a_weak_dense_arm_is_called_failed() -> None:
    text = mrpc_table({"full": [_record("full", 0, 0.73)]})
    assert text.endswith("**Failed setup:** less than 5 points over the majority class: full fine-tuning.")


def test_no_record() -> None:
    with pytest.raises(DataError, match="there is no record to make a table of"):
        mrpc_table({"full": []})


def test_tiny_run_goes_on_where_it_stopped(tmp_path: Path, cache_dir: Path) -> None:
    mrpc.main(["--tiny", "--out", str(tmp_path)])
    paths = sorted(tmp_path.glob("*.json"))
    arms = ("full", "houlsby", "houlsby32", "snip40")
    assert [path.stem for path in paths] == sorted(f"{arm}-seed{s}" for arm in arms for s in (0, 1))
    before = {path: path.read_bytes() for path in paths}
    paths[0].unlink()
    changed: dict[str, Any] = json.loads(paths[-1].read_text())
    changed["config"]["run"]["lr"] = 1.0
    paths[-1].write_text(json.dumps(changed))
    mrpc.main(["--tiny", "--out", str(tmp_path)])
    assert all(path.read_bytes() == before[path] for path in paths[1:-1])
    again, first = read_record(paths[0]), RunRecord(**json.loads(before[paths[0]]))
    assert again.series == first.series
    assert read_record(paths[-1]).config["run"]["lr"] == 1e-3
    assert read_record(paths[-1]).results["kept_share"] == pytest.approx(0.6, abs=1e-3)


def test_changes_that_are_not_committed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shared.environment", lambda: {"dirty": True})
    with pytest.raises(UsageError, match="uncommitted changes: commit them, or give --allow-dirty"):
        mrpc.main(["--out", str(tmp_path)])


def test_missing_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_LIGHTNING_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PEFT_LIGHTNING_ENCODER", str(tmp_path))
    monkeypatch.setattr("benchmarks.shared.environment", lambda: {"dirty": False})
    with pytest.raises(UsageError, match="nowhere is no folder"):
        mrpc.main(["--out", str(tmp_path)])
    shutil.rmtree(tmp_path)
