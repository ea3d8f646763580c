"""The benchmark of further kinds of task end to end on toy data, and its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tasks
from benchmarks.shared import ROOT
from benchmarks.tasks_arms import SUITES
from benchmarks.tasks_table import kinds_table
from peft_lightning.errors import DataError
from peft_lightning.study.records import read_record
from peft_lightning.tasks.table import get_task

OPTIONS = ["--tiny", "--threads", "1", "--out"]


def test_recipes_are_those_of_the_paper() -> None:
    by_name = {suite.name: suite for suite in SUITES}
    assert {arm.adapter.bottleneck for arm in by_name["squad_v1"].arms} == {256}
    assert {(arm.adapter.bottleneck, arm.adapter.cross) for arm in by_name["xsum"].arms} == {(512, True)}
    kinds = {get_task(name).kind for name in by_name}
    assert kinds == {"span", "tags", "choice", "classify", "generate"}
    for suite in SUITES:
        assert [(arm.name, arm.prune.share) for arm in suite.arms] == [("dense", 0.0), ("snip40", 0.4)]


def test_tiny_runs(tmp_path: Path, cache_dir: Path) -> None:
    tasks.main(["--part", "learn", *OPTIONS, str(tmp_path)])
    records = {path.stem: read_record(path) for path in tmp_path.glob("*.json")}
    assert set(records) == {
        f"{suite.name}-{arm.name}-seed{seed}" for suite in SUITES for arm in suite.arms for seed in suite.seeds[:2]
    }
    for record in records.values():
        assert record.results["steps"] == 6
        assert 0 <= record.results[str(record.data["metric"])] <= 1
    table = kinds_table(SUITES, tmp_path)
    shown = [line.split(" | ") for line in table.splitlines() if line[:2] == "| "][2:]
    assert {(cells[0].removeprefix("| "), cells[1]) for cells in shown} == {
        (suite.name, metric)
        for suite in SUITES
        for metric in get_task(str(records[f"{suite.name}-dense-seed0"].data["task"])).metrics
    }
    assert "the majority class" not in table.split("\n\n")[1]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    tasks.main(["--part", "learn", *OPTIONS, str(tmp_path), "--suite", "copa"])
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == before


def test_tiny_speed(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks.main(["--part", "speed", *OPTIONS, str(tmp_path)])
    results = read_record(tmp_path / "speed.json").results
    assert min(results["windows"], results["from_file"], results["tokenizer"]) > 0
    assert 0 < results["outside"] < 1
    assert f"{results['windows']:,.0f}" in capsys.readouterr().out


def test_no_record_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no record to make a table of"):
        kinds_table(SUITES, tmp_path)


def test_the_documents_have_the_places() -> None:
    for path, names in (("benchmarks/RESULTS.md", ("tasks", "tasks-speed")), ("README.md", ("tasks",))):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(text.count(f"<!-- generated: {name} -->") == 1 for name in names)
