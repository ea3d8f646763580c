"""metrics.csv keeps every row, grows columns, and is cut back exactly."""

from __future__ import annotations

from pathlib import Path

from peft_lightning.callbacks.log import MetricsCSV


def test_rows_columns_and_cutting(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    assert log.read() == []
    log.log_metrics({"a": 0.1}, 1)
    log.log_metrics({"a": 0.2}, 2)
    log.log_metrics({"b": 1 / 3}, 2)
    log.log_metrics({"a": 0.3, "b": 3.0}, 3)
    rows = log.read()
    assert rows == [
        {"step": "1", "a": "0.1"},
        {"step": "2", "a": "0.2"},
        {"step": "2", "b": repr(1 / 3)},
        {"step": "3", "a": "0.3", "b": "3.0"},
    ]
    log.cut(2)
    assert log.read() == rows[:2]
    log.log_metrics({"b": 1 / 3}, 2)
    log.log_metrics({"a": 0.3, "b": 3.0}, 3)
    assert log.read() == rows
    log.cut(0)
    assert log.read() == []


def test_half_a_line_of_a_killed_process_is_ignored(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 0.1}, 1)
    with open(log.path, "a") as file:
        file.write("2,0.")
    assert log.read() == [{"step": "1", "a": "0.1"}]
