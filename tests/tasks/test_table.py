"""The table of tasks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from peft_lightning.errors import UsageError
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import TASKS, Task, get_task

SUMMARIES = {"xsum", "scitldr", "aeslc", "toy_copy"}
GLUE = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mm", "qnli", "rte", "wnli"}
CHOICE = {"copa", "winogrande", "commonsense_qa", "social_iqa", "piqa", "hellaswag", "arc_easy", "arc_challenge"}
CHOICE |= {"openbookqa"}
WORDS = {"wic", "wsc"}
ANSWERS = {"multirc"}
INFERENCE = {"snli", "scitail", "sick", "anli_r1", "anli_r2", "anli_r3", "paws", "boolq_closed_book"}
TONES = {"imdb", "rotten_tomatoes", "yelp_polarity", "yelp_sentences", "yelp_reviews_5", "amazon_reviews_5"}
TOYS = {"toy_choice", "toy_groups", "toy_marked", "toy_topics"}


def test_table_holds_what_is_promised() -> None:
    assert {
        *GLUE,
        *SUMMARIES,
        *CHOICE,
        *WORDS,
        *ANSWERS,
        *INFERENCE,
        *TONES,
        *TOYS,
        "boolq",
        "cb",
        "conll2003",
        "ontonotes",
        "toy_tags",
        "squad_v1",
        "squad_v2",
        "toy_span",
        "toy_sentiment",
        "toy_pairs",
        "toy_similarity",
    } == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_every_row_is_whole(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert set(task.splits) == {"train", "validation", "test", "predict"}
    kind = build_kind(task)
    # a collection keeps its metrics in alphabetical order
    assert sorted(map(str, kind.metrics())) == sorted(task.metrics)
    if kind.classifies:
        assert kind.num_outputs == (len(task.labels) or 1)


@pytest.mark.parametrize("name", TASKS)
def test_plain_dict_round_trip(name: str) -> None:
    assert Task(**asdict(TASKS[name])) == TASKS[name] == get_task(asdict(TASKS[name]))


@pytest.mark.parametrize("name", [*sorted(GLUE), "boolq", "cb"])
def test_test_stage_reads_labelled_split(name: str) -> None:
    splits = TASKS[name].splits
    assert splits["test"] == splits["validation"] != splits["predict"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("choice", CHOICE), ("marked", WORDS), ("grouped", ANSWERS), ("classify", INFERENCE | TONES)],
)
def test_kinds_of_further_rows(kind: str, names: set[str]) -> None:
    assert {get_task(name).kind for name in names} == {kind}


@pytest.mark.parametrize("name", TASKS)
def test_other_names_are_those_of_columns_that_are_read(name: str) -> None:
    task = get_task(name)
    assert set(task.also) <= set(build_kind(task).columns(labelled=True))


def test_rounds_of_anli_are_splits_of_one_folder() -> None:
    task = get_task("anli_r2")
    assert task.folder == "anli"
    assert task.splits == {"train": "train_r2", "validation": "dev_r2", "test": "test_r2", "predict": "test_r2"}


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
    with pytest.raises(UsageError, match=rf"task is {name!r}; allowed: cola, sst2, mrpc, .*toy_similarity, .*or the f"):
        get_task(name)
