"""Rows that do not fit their kind end in one line that names the file, the row and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_lightning import TaskDataModule
from peft_lightning.errors import DataError
from peft_lightning.tasks.table import Task

CHOICE: dict[str, Any] = {"kind": "choice", "text": ("question",), "options": {"choices": ["choices"]}}
PLACE = {"text": "the cat", "label": 0, "at": 1, "word": "cat"}
SPAN: dict[str, Any] = {"kind": "span", "text": ("question", "context"), "label": "answers", "metrics": ("f1",)}
TAGS: dict[str, Any] = {"kind": "tags", "text": ("words",), "labels": ("O", "B-A", "I-A"), "metrics": ("f1",)}
TOPICS: dict[str, Any] = {"kind": "multilabel", "labels": ("a", "b"), "metrics": ("f1_micro",)}
ASKED = {"question": "cat", "context": "the red cat", "answers": {"text": ["red"], "answer_start": [4]}}
GROUPED: dict[str, Any] = {
    "kind": "grouped",
    "labels": ("no", "yes"),
    "metrics": ("f1a",),
    "options": {"group": ["of"]},
}
MARKED: dict[str, Any] = {"kind": "marked", "labels": ("no", "yes"), "options": {"words": {"text": ["at", "word"]}}}

# task, a good row, what is wrong in the row after it, and the end of the message
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "one choice": (CHOICE, {"question": "?", "choices": ["a", "b"], "label": 0}, {"choices": ["a"]}, "has 1 choice"),
    "a label beyond the choices": (
        CHOICE,
        {"question": "?", "choices": ["a", "b", "c"], "label": 2},
        {"choices": ["a", "b"]},
        r"column 'label': the label is 2; allowed for 2 choices",
    ),
    "labels of other choices": (
        CHOICE,
        {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "label": "B"},
        {"choices": {"text": ["a", "b"], "label": ["A"]}},
        "2 choices with 1 labels; allowed: as many",
    ),
    "an unknown group label": (GROUPED, {"text": "a", "of": 1, "label": "yes"}, {"label": "maybe"}, "'maybe'.*no, yes"),
    "no such word": (MARKED, PLACE, {"at": 2}, r"there is no word 2; allowed: 0 to 1"),
    "another word": (MARKED, PLACE, {"word": "dog"}, r"word 1 of the text begins 'cat'; allowed: 'dog'"),
    "a class that is none": (TOPICS, {"text": "a", "label": ["a"]}, {"label": ["a", "c"]}, "'c'.*a, b"),
    "an answer elsewhere": (
        SPAN,
        ASKED,
        {"answers": {"text": ["red"], "answer_start": [5]}},
        "column 'answers': the answer 'red' is not at 5 in the context",
    ),
    "no answer": (SPAN, ASKED, {"answers": {"text": [], "answer_start": []}}, "there is no answer; allowed: at least"),
    "tags that do not fit": (TAGS, {"words": ["a", "b"], "label": [1, 2]}, {"label": [1]}, "1 tags for 2 words"),
    "an unknown tag": (TAGS, {"words": ["a"], "label": ["O"]}, {"label": ["B-B"]}, "the tag is 'B-B'; allowed"),
    "no summary": (
        {"kind": "generate", "metrics": ("rouge1",)},
        {"text": "a", "label": "a"},
        {"label": None},
        "is no summary",
    ),
}


def _load(folder: Path, task: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options: dict[str, Any] = {"tokenizer": "toy", "root": str(folder), "cache_dir": str(folder / "cache")}
    TaskDataModule(task=Task(name="mine", **task), **options).load("train")


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_row_is_named(case: str, tmp_path: Path) -> None:
    task, good, wrong, message = CASES[case]
    _load(tmp_path, task, [good, good])
    with pytest.raises(DataError, match=rf"train\.jsonl: row 1\b.*{message}") as caught:
        _load(tmp_path, task, [good, {**good, **wrong}])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_missing_column_is_named(case: str, tmp_path: Path) -> None:
    task, good, _, _ = CASES[case]
    for column in good:
        rest = {name: value for name, value in good.items() if name != column}
        with pytest.raises(DataError, match=rf"train\.jsonl: has no column '{column}'; there are: {', '.join(rest)}"):
            _load(tmp_path, task, [rest])
