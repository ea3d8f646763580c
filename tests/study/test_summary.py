"""The table of a study: chosen on the dev shots, averaged over seeds, beside the majority class."""

from __future__ import annotations

from typing import Any

from peft_lightning.study.statistics import mean_interval
from peft_lightning.study.summary import below_majority, summary


def record(seed: int, lr: float | None, dev: float, test: float, **names: Any) -> dict[str, Any]:
    cell = {"method": "m", "variant": "default", "task": "t", "shots": 10, "seed": seed, "lr": lr, "epochs": 5, **names}
    scores = {"dev": {"f1": dev, "loss": 1.0}, "test": {"f1": test, "loss": 1.0}}
    return {"cell": cell, "metric": "f1", **scores, "trained_parameters": 1234}


def test_a_row_a_method_with_interval_and_majority() -> None:
    records = [
        record(1, 0.1, 0.5, 0.9),
        record(1, 0.2, 0.6, 0.7),
        record(2, 0.1, 0.4, 0.9),
        record(2, 0.2, 0.5, 0.8),
        record(1, None, 0.1, 0.5, method="zero", epochs=0),
        {"cell": record(2, None, 0, 0, method="zero", epochs=0)["cell"], "error": "it broke"},
        {"cell": record(1, 0.1, 0, 0, shots=20)["cell"], "error": "it broke"},
    ]
    first, zero, failed = summary(records, {"t": {"f1": 0.625}})
    assert first == {
        "task": "t",
        "shots": "10",
        "method": "m",
        "metric": "f1",
        "test mean": "75.0",
        "seeds": "2",
        "majority class": "62.5",
        "chosen on dev": "lr 0.2, 5 epochs",
        "trained": "1,234",
        "failed cells": "",
    }
    assert (zero["test mean"], zero["seeds"], zero["failed cells"]) == ("50.0", "1", "1")
    assert zero["chosen on dev"] == "0 epochs"
    assert (failed["shots"], failed["test mean"], failed["failed cells"]) == ("20", "", "1")


def test_three_seeds_have_an_interval_and_what_is_below_the_majority_class_is_named() -> None:
    scores = {"low": [0.5, 0.6, 0.4], "high": [0.6, 0.8, 0.7]}
    records = [
        record(seed, 0.1, 0.5, test, method=method)
        for method, tests in scores.items()
        for seed, test in enumerate(tests)
    ]
    low, high = summary(records, {"t": {"f1": 0.625}})
    assert low["test mean"] == mean_interval([50.0, 60.0, 40.0]).format(1) and "±" in high["test mean"]
    assert below_majority([low, high]) == "below the majority class: low on t, 10 shots"
    assert below_majority([high]) == below_majority(summary(records, {})) == ""


def test_without_a_majority_class_it_says_so() -> None:
    (row,) = summary([record(1, 0.1, 0.5, 0.9, variant="x")], {})
    assert row["majority class"] == "n/a" and row["chosen on dev"] == "x, lr 0.1, 5 epochs"
