"""The table of tasks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from peft_lightning.errors import UsageError
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import TASKS, Task, get_task

GLUE = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mm", "qnli", "rte", "wnli"}


def test_table_holds_what_is_promised() -> None:
    assert {*GLUE, "boolq", "cb", "toy_sentiment", "toy_pairs", "toy_similarity"} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_whole(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert set(task.splits) == {"train", "validation", "test", "predict"}
    kind = build_kind(task)
    assert tuple(kind.metrics()) == task.metrics
    assert kind.num_outputs == (len(task.labels) or 1)


@pytest.mark.parametrize("name", TASKS)
def test_plain_dict_round_trip(name: str) -> None:
    assert Task(**asdict(TASKS[name])) == TASKS[name] == get_task(asdict(TASKS[name]))


@pytest.mark.parametrize("name", [*sorted(GLUE), "boolq", "cb"])
def test_test_stage_reads_labelled_split(name: str) -> None:
    splits = TASKS[name].splits
    assert splits["test"] == splits["validation"] != splits["predict"]


def test_mnli_mismatched_shares_the_folder_of_mnli() -> None:
    assert get_task("mnli_mm").folder == get_task("mnli").folder == "mnli"
    assert get_task("mnli_mm").splits["validation"] == "validation_mismatched"
    assert get_task("mnli_mm").splits["predict"] == "test_mismatched"


def test_lists_become_tuples_and_splits_are_completed() -> None:
    fields: dict[str, Any] = {"name": "mine", "labels": ["a", "b"], "splits": {"validation": "dev"}}
    task = get_task(fields)
    assert task.labels == ("a", "b")
    assert task.splits == {"train": "train", "validation": "dev", "test": "test", "predict": "test"}
    assert task.folder == "mine"
    assert get_task(task) is task


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "text"}, r"task.text is 'text'; allowed: a list of strings"),
        ({"text": []}, r"task.text is \[\]; allowed: the names of one or two columns"),
        ({"text": ["a", "b", "c"]}, r"task.text is .*; allowed: the names of one or two columns"),
        ({"text": [""]}, r"task.text is \[''\]; allowed: the names of one or two columns"),
        ({"labels": ["a", "a"]}, r"task.labels is \['a', 'a'\]; allowed: a list of different names"),
        ({"labels": [0, 1]}, r"task.labels is \[0, 1\]; allowed: a list of strings"),
        ({"metrics": []}, r"task.metrics is empty; allowed: at least one metric"),
        ({"splits": {"val": "dev"}}, r"task.splits names the stage 'val'; allowed: train, validation, test"),
        ({"columns": ["a"]}, r"task has the field 'columns'; allowed: kind, text, label"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_task(fields)


@pytest.mark.parametrize("name", ["mprc", "", 7])
def test_unknown_name_lists_the_known_ones(name: Any) -> None:
    with pytest.raises(UsageError, match=rf"task is {name!r}; allowed: cola, sst2, mrpc, .*toy_similarity, or"):
        get_task(name)
