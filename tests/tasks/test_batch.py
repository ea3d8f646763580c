"""Batches: padding, rows of several sequences, what people ask."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning.errors import UsageError
from peft_lightning.functional.sequences import row_of_sequence, sum_by_row
from peft_lightning.tasks.batch import batch_of_lists, chosen, make_batch, rows_of

ROWS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5)


@given(rows=ROWS)
def test_sequences_of_a_row_lie_side_by_side(rows: list[list[int]]) -> None:
    """``rows`` holds the lengths of each row's sequences; token t of sequence s is 10 s + t."""
    flat = [length for row in rows for length in row]
    tokens = np.concatenate([10 * s + np.arange(length) for s, length in enumerate(flat)])
    per_row = np.array([sum(row) for row in rows])
    ragged = {
        "input_ids": (tokens, per_row),
        "token_places": (tokens + 1, per_row),
        "sizes": (np.array(flat), np.array([len(row) for row in rows])),
        "labels": (np.array(flat), np.array([len(row) for row in rows])),
    }
    batch = make_batch({"group": np.arange(len(rows))}, ragged, pad_token_id=7)
    inputs, width = batch["inputs"], max(flat)
    assert set(inputs) == {"input_ids", "attention_mask", "token_places", "sequences", "group"}
    for s, length in enumerate(flat):
        assert inputs["input_ids"][s].tolist() == [10 * s + t for t in range(length)] + [7] * (width - length)
        assert inputs["attention_mask"][s].tolist() == [1] * length + [0] * (width - length)
        assert inputs["token_places"][s].tolist() == [10 * s + t + 1 for t in range(length)] + [0] * (width - length)
    assert inputs["sequences"].tolist() == [len(row) for row in rows]
    most = max(map(len, rows))
    assert batch["labels"].tolist() == [row + [-100] * (most - len(row)) for row in rows]
    owners = [number for number, row in enumerate(rows) for _ in row]
    found = row_of_sequence(inputs)
    assert found is not None and found.tolist() == owners
    values = torch.arange(2.0 * len(flat)).view(-1, 2)
    expected = [
        [sum(values[s, c].item() for s, o in enumerate(owners) if o == b) for c in (0, 1)] for b in range(len(rows))
    ]
    assert sum_by_row(values, inputs).tolist() == expected


def test_rows_of_one_sequence_are_as_they_are() -> None:
    values = torch.ones(3, 2)
    assert row_of_sequence({}) is None and sum_by_row(values, {}) is values


def test_references_are_read() -> None:
    texts = [json.dumps(value) for value in ({"gold": ["é"]}, {})]
    columns: dict[str, Any] = {"input_ids": [[1, 2], [3]], "reference": texts, "labels": [1, 0]}
    batch = batch_of_lists(columns, pad_token_id=0)
    assert batch["references"] == [{"gold": ["é"]}, {}] and batch["labels"].tolist() == [1, 0]
    assert set(batch["inputs"]) == {"input_ids", "attention_mask"}


def test_chosen_rows_of_tensors_and_lists() -> None:
    keep = torch.tensor([True, False, True])
    assert chosen(torch.arange(3), keep).tolist() == [0, 2]
    assert chosen(["a", "b", "c"], keep) == ["a", "c"]


def test_what_people_ask() -> None:
    pair = ("one", "two")
    asked: list[Any] = [("a", "b"), {"one": "c", "two": "d", "more": 1}]
    rows = rows_of(asked, pair, pair)
    assert [[row[name] for name in pair] for row in rows] == [["a", "b"], ["c", "d"]]
    assert rows_of(["a"], ("text",), ("text",)) == [{"text": "a"}]
    assert rows_of([["a"], ["a", "b"]], ("text",), ("text",)) == [{"text": "a"}, {"text": ["a", "b"]}]
    two = r"allowed: 2 texts or a mapping with one, two$"
    for wrong, said in (
        ("a", "is a str"),
        (("a", "b", "c"), "is a tuple"),
        (3, "is a int"),
        ({"one": "a"}, "has no 'two'"),
    ):
        with pytest.raises(UsageError, match=rf"^texts\[1\] {said}; {two}"):
            rows_of([("a", "b"), wrong], pair, pair)
    with pytest.raises(UsageError, match=r"^texts\[0\] has no 'choices'; allowed: a mapping with question, choices$"):
        rows_of(["a"], ("question",), ("question", "choices"))
    with pytest.raises(UsageError, match=r"^texts\[0\] is a NoneType; allowed: a text or a mapping with text$"):
        rows_of([None], ("text",), ("text",))
    for lone, what in (("a", "text"), ({"one": "a"}, "row")):
        with pytest.raises(UsageError, match=f"give a list, not one {what}"):
            rows_of(lone, pair, pair)
