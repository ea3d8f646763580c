"""Columns by name, and cutting that spares a part of a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.errors import UsageError
from peft_lightning.tasks.rows import encode_cut, name_list, places, second_last, whole_number

FIRSTS = ["the red cat sleeps", "the dog", "this horse is not good", ""]
SECONDS = ["a b", "that fish is tiny", "cat", "the small horse"]


@pytest.mark.parametrize("names", ["choices", ["a", "a"], [1], [""], None, {"a": 1}])
def test_option_that_is_no_list_of_names(names: Any) -> None:
    with pytest.raises(UsageError, match=r"task.options.columns is .*; allowed: a list of different names"):
        name_list({"columns": names}, "columns")


def test_option_with_too_few_names() -> None:
    assert name_list({"columns": []}, "columns") == ()
    assert name_list({"columns": ["a", "b"]}, "columns", least=2) == ("a", "b")
    with pytest.raises(UsageError, match=r"task.options.columns is \('a',\); allowed: a list of 2 or more different"):
        name_list({"columns": ("a",)}, "columns", least=2)


@pytest.mark.parametrize("value", [0, -3, 1 << 70, np.int8(5), np.uint64(7)])
def test_whole_numbers(value: Any) -> None:
    assert whole_number(value) == value and type(whole_number(value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(1), "1", None, [1]])
def test_no_whole_numbers(value: Any) -> None:
    assert whole_number(value) is None


@pytest.mark.parametrize("max_length", [8, 9, 10, 50])
def test_pairs_are_cut_as_the_tokenizer_cuts_the_first_text(max_length: int) -> None:
    """Where something is left of it, transformers' own truncation does the same."""
    found = encode_cut(toy_tokenizer(), [FIRSTS[:3], SECONDS[:3]], max_length, second_last)
    expected = toy_tokenizer()(FIRSTS[:3], SECONDS[:3], truncation="only_first", max_length=max_length)
    assert found == {name: expected[name] for name in ("input_ids", "token_type_ids")}


def test_second_text_is_cut_when_nothing_is_left_of_the_first() -> None:
    tokenizer = toy_tokenizer()
    found = encode_cut(tokenizer, [FIRSTS[1:], SECONDS[1:]], 6, second_last)
    assert [tokenizer.decode(tokens) for tokens in found["input_ids"]] == [
        "[CLS] [SEP] that fish is [SEP]",
        "[CLS] this horse [SEP] cat [SEP]",
        "[CLS] [SEP] the small horse [SEP]",
    ]
    assert found["token_type_ids"] == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]]


def test_order_may_be_chosen_by_row() -> None:
    tokenizer = toy_tokenizer()
    found = encode_cut(tokenizer, [FIRSTS[:3]], 4, lambda row, encoding: places(encoding, 0)[:: 1 if row else -1])
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found["input_ids"]]
    assert texts == ["the red", "the dog", "not good"]


def test_tokenizer_without_places() -> None:
    class Slow:
        is_fast, name_or_path = False, "mine"

    with pytest.raises(UsageError, match=r"tokenizer 'mine' is a Slow; allowed for this kind: a fast one"):
        encode_cut(Slow(), [["a"]], 8, second_last)
