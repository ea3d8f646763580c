"""The speed of studies end to end on toy data, and its table from a record made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study_speed import main, speed_table
from peft_lightning.study.records import read_record


def test_tiny(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "study_speed_cpu.json")
    assert set(record.series) == {"process", "loop", "together", "long", "workers"}
    assert all(value > 0 for values in record.series.values() for value in values)
    assert record.config["runs"] == {"process": 1, "loop": 2, "together": 2, "long": 10, "workers": 10}
    assert {name for name in record.results if "/" in name} == {
        f"accuracy/{arm}" for arm in ("loop", "together", "long", "workers")
    }
    table = speed_table(record)
    assert table in capsys.readouterr().out
    assert "Medians of 1 turns of 2 runs, a process each for 1 of them, the larger grid 10; ratios" in table
    series = {"process": [1.0, 2.0, 4.0], "loop": [4.0, 5.0, 2.0], "together": [6.0] * 3}
    series |= {"long": [7.0] * 3, "workers": [9.0] * 3}
    results = {"process": 2.0, "loop": 4.0, "together": 6.0, "long": 7.0, "workers": 9.0}
    by_hand = replace(record, series=series, results=results)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in speed_table(by_hand).splitlines()[2:7]]
    assert rows == [
        ["a process for each run", "2.0", "3.00", "at least 2"],
        ["one by one", "4.0", "1.50", "at least 1.2"],
        ["side by side", "6.0", "", ""],
        ["side by side, a larger grid", "7.0", "", ""],
        ["the larger grid in a process for each thread", "9.0", "", ""],
    ]
