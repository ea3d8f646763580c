"""``study`` from the command line: its files and table, that it goes on, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_lightning.cli.main import main
from tests.cli.test_tools import refused
from tests.study.helpers import SPARSE, folder, grid_of


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A grid of four short cells."""
    values = grid_of(folder(tmp_path / "backbone"), {"adapter": SPARSE}, lr=[1e-3, 5e-3], epochs=[2])
    return written(tmp_path / "grid.yaml", values)


def written(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_it_runs_writes_a_table_and_goes_on(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "--config", str(grid), "--output", str(tmp_path / "out")]
    main(words)
    said = capsys.readouterr()
    text = (tmp_path / "out" / "summary.md").read_text()
    (header, _, row, *rest) = text.splitlines()
    assert header.startswith("| task | shots | method | metric | test mean | seeds | majority class | chosen on dev |")
    assert row.startswith("| toy_sentiment | 10 | adapter | accuracy | ") and "±" not in row
    assert "adapter" in said.out and "majority class" in said.out
    assert ("note: below the majority class: adapter on toy_sentiment, 10 shots\n" in said.out) == (len(rest) == 2)
    assert "cell 4/4" in said.err
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert len(files) == 4 and {json.loads(path.read_text())["side_by_side"] for path in files} == {4}
    main([*words, "--side_by_side", "1"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == files
    assert (tmp_path / "out" / "summary.md").read_text() == text


def test_later_files_and_flags_come_first(grid: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("lr: [1e-3]\ndata: {shots: [5]}\nmethods: {adapter: {init_args: {optim: {weight_decay: 1e-2}}}}\n")
    words = ["study", "--config", str(grid), "--config", str(more), "--output", str(tmp_path / "out")]
    main([*words, "--side_by_side", "1", "--device", "cpu"])
    about = json.loads((tmp_path / "out" / "study.json").read_text())
    assert about["grid"]["side_by_side"] == 1 and len(about["cells"]) == 2
    assert about["grid"]["data"]["shots"] == [5] and about["grid"]["data"]["max_length"] == 16
    assert about["grid"]["lr"] == [0.001]


def test_failed_cells_end_in_one_line_and_status_1(
    grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {**SPARSE, "init_args": {"prune": {"score": "given", "sparsity": 0.5}}}
    more = written(tmp_path / "more.yaml", {"methods": {"bad": bad}})
    words = ["study", "--config", str(grid), "--config", str(more), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        main(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1 and line.startswith("peft-lightning: error: ")
    assert "4 of 8 cells failed, and are tried again by the same command" in line
    assert "method bad" in line and "masks that come with a file" in line
    assert len((tmp_path / "out" / "summary.md").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sides: 3", "study has no option 'sides'"),
        ("[1]", "must hold a mapping"),
        ("a: [", "is no YAML"),
        ("seeds: [a]", "study.seeds = ['a']"),
        ("side_by_side: 0", "study.side_by_side = 0"),
        ("data: {root: /nowhere}", "root is '/nowhere'"),
        (
            "methods: {adapter: {init_args: {adapter: {kind: none}}}}",
            "methods.adapter (default): adapter.kind = 'none'",
        ),
    ],
)
def test_wrong_grids_are_refused(
    grid: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(content)
    words = ["study", "--config", str(grid), "--config", str(more), "--output", str(tmp_path / "out")]
    assert message in refused(*words, status=2, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_refused(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config" in refused("study", "--output", "x", status=2, capsys=capsys)
    assert "--output" in refused("study", "--config", str(grid), status=2, capsys=capsys)
    words = ["study", "--config", str(tmp_path / "none.yaml"), "--output", "x"]
    assert "there is no such file" in refused(*words, status=2, capsys=capsys)
    words = ["study", "--config", str(grid), "--output", str(grid)]
    assert "is a file; must be a folder" in refused(*words, status=2, capsys=capsys)
    words = ["study", "--config", str(grid), "--output", "x", "--side_by_side", "0"]
    assert "side_by_side = 0" in refused(*words, status=2, capsys=capsys)
