"""The variant that counts is the best on the dev shots; the test rows are not looked at."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from peft_lightning.errors import UsageError
from peft_lightning.study.selection import choose


def cell(score: float, loss: float = 1.0, test: float = 0.5, **names: Any) -> dict[str, Any]:
    known = {"method": "m", "variant": "v", "task": "t", "shots": 10, "seed": 1, "lr": 0.1, "epochs": 5}
    return {
        "cell": {**known, **names},
        "metric": "f1",
        "dev": {"accuracy": 1 - score, "f1": score, "loss": loss},
        "test": {"accuracy": test, "f1": test, "loss": 1.0},
    }


def test_one_of_each_run_by_the_first_metric() -> None:
    cells = [cell(0.5, lr=0.1), cell(0.7, lr=0.2), cell(0.6, variant="w"), cell(0.2, seed=2), cell(0.1, method="n")]
    assert choose(cells) == [cells[1], cells[3], cells[4]]


def test_ties_go_to_the_lower_loss_and_then_to_the_first() -> None:
    cells = [cell(0.5, 1.0, lr=0.1), cell(0.5, 0.9, lr=0.2), cell(0.5, 0.9, lr=0.3)]
    assert choose(cells) == [cells[1]]
    assert choose([cells[2], cells[1], cells[0]]) == [cells[2]]


def test_the_test_rows_are_not_looked_at() -> None:
    cells = [cell(0.5, test=0.9, lr=0.1), cell(0.6, test=0.1, lr=0.2)]
    blind = copy.deepcopy(cells)
    for one in blind:
        del one["test"]
    assert [one["cell"] for one in choose(blind)] == [one["cell"] for one in choose(cells)] == [cells[1]["cell"]]


def test_failed_cells_are_passed_over() -> None:
    failed = {"cell": cell(0)["cell"], "error": "it broke"}
    good = cell(0.1, lr=0.2)
    assert choose([failed, good]) == [good]
    assert choose([failed]) == []


def test_no_number_never_wins() -> None:
    cells = [cell(float("nan"), lr=0.1), cell(0.1, lr=0.2), cell(0.9, float("nan"), lr=0.3)]
    assert choose(cells) == [cells[1]]


def test_one_choice_for_several_runs_is_by_the_mean() -> None:
    rates = {0.1: (0.9, 0.1, 0.5), 0.2: (0.6, 0.6, 0.6)}
    cells = [cell(score, lr=lr, seed=seed) for lr, scores in rates.items() for seed, score in enumerate(scores)]
    assert [one["cell"]["lr"] for one in choose(cells, per=("method", "task"))] == [0.2] * 3
    assert [one["cell"]["lr"] for one in choose(cells)] == [0.1, 0.2, 0.2]
    # One that lacks a run is not compared by its luck on the others.
    assert [one["cell"]["lr"] for one in choose([cells[0], *cells[3:]], per=("method",))] == [0.2] * 3


def test_groups_are_of_runs() -> None:
    with pytest.raises(UsageError, match=r"per has 'lr'; allowed: method, task, shots, seed"):
        choose([], per=("lr",))
