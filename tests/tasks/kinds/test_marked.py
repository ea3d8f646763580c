"""Words marked in texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from peft_lightning import FineTuneModule
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task, get_task
from tests.toy import build, data, tiny, trainer

MODEL: Any = None  # this kind asks nothing of it
# the marks are words of the toy language, so that they can be read back
WORDS = {"words": {"text": ["i", "one", "j", "two"]}, "marks": ["good", "bad"]}
PLACES = {"characters": {"a": ["a1", "a2"], "b": ["b1", "b2"]}, "marks": ["good"]}


def task(options: dict[str, Any], **fields: Any) -> Task:
    return Task(**{"kind": "marked", "labels": ("no", "yes"), "options": options, **fields})


def pair(**options: Any) -> Task:
    return task({**PLACES, **options}, text=("a", "b"))


def texts(task: Task, max_length: int = 64, first_row: int = 0, **columns: Any) -> list[str]:
    """What a model reads of one row."""
    rows = {name: [value] for name, value in columns.items()}
    encoded = build_kind(task).encode(rows, toy_tokenizer(), max_length, labelled=False, first_row=first_row)
    tokens: Any = encoded["input_ids"][0]
    assert len(tokens) <= max_length
    return [text.strip() for text in toy_tokenizer().decode(tokens).removeprefix("[CLS]").split("[SEP]")[:-1]]


# -- marks


def test_words_by_number_are_marked() -> None:
    text = "the cat runs the small dog sleeps"
    assert texts(task(WORDS), text=text, i=1, one="cat", j=3, two="the small dog") == [
        "the good cat good runs bad the small dog bad sleeps"
    ]
    assert texts(task(WORDS), text=text, i=6, one="sleeps", j=0, two="the") == [
        "bad the bad cat runs the small dog good sleeps good"
    ]


def test_words_by_character_are_marked_in_both_texts() -> None:
    row: dict[str, Any] = {"a": "the cat runs", "a1": 4, "a2": 7, "b": "cat", "b1": 0, "b2": 3}
    assert texts(pair(), **row) == ["the good cat good runs", "good cat good"]
    assert texts(pair(front=["w"]), **row, w="cat") == ["cat [UNK] the good cat good runs", "good cat good"]


def test_words_that_touch_or_hold_each_other() -> None:
    text = "the small dog sleeps"
    assert texts(task(WORDS), text=text, i=0, one="the small", j=2, two="dog") == [
        "good the small good bad dog bad sleeps"
    ]
    assert texts(task(WORDS), text=text, i=0, one="the small dog", j=1, two="small") == [
        "good the bad small bad dog good sleeps"
    ]
    assert texts(task(WORDS), text=text, i=1, one="small dog", j=1, two="small") == [
        "the good bad small bad dog good sleeps"
    ]
    assert texts(task(WORDS), text=text, i=2, one="dog", j=1, two="small dog") == [
        "the bad small good dog good bad sleeps"
    ]


@pytest.mark.parametrize(
    ("text", "index", "wanted", "expected"),
    [
        ("the Cat, runs", 1, "cat", "the good cat good [UNK] runs"),
        ('the "cat" runs', 1, "cat", "the [UNK] good cat good [UNK] runs"),
        ("the cat runs", 1, "cat,", "the good cat good runs"),
        ("the cat\nruns now", 1, "CAT runs", "the good cat runs good [UNK]"),
        ("the cat runs", 1, " cat ", "the good cat good runs"),
        ("the  small dog", 1, "small\ndog", "the good small dog good"),
        ("the cat runs", 0, "cat", "the good cat good runs"),
        ("the cat runs", 2, "cat", "the good cat good runs"),
        ("cat cat cat", 1, "cat", "cat good cat good cat"),
    ],
)
def test_published_words_may_differ_a_little(text: str, index: int, wanted: str, expected: str) -> None:
    single = task({"words": {"text": ["i", "one"]}, "marks": ["good"]})
    assert texts(single, text=text, i=index, one=wanted) == [expected]


@pytest.mark.parametrize(
    ("index", "wanted", "message"),
    [
        (3, "cat", r"there is no word 3; allowed: 0 to 2"),
        (-1, "cat", r"there is no word -1; allowed: 0 to 2"),
        (None, "cat", r"there is no word None; allowed: 0 to 2"),
        (1, "dog", r"word 1 of the text begins 'cat'; allowed: 'dog', or where it stands"),
        (2, "the", r"word 2 of the text begins 'runs'; allowed: 'the'"),
        (1, "cat runs far", r"word 1 of the text begins 'cat runs'; allowed: 'cat runs far'"),
        (1, "", r"'' is not a text of one word or more"),
        (1, None, r"None is not a text of one word or more"),
    ],
)
def test_words_that_are_not_there(index: Any, wanted: Any, message: str) -> None:
    row = {"text": "the cat runs", "i": 0, "one": "the", "j": index, "two": wanted}
    with pytest.raises(DataError, match=rf"row 5, columns 'j' and 'two': {message}"):
        texts(task(WORDS), first_row=5, **row)


@pytest.mark.parametrize(("start", "end"), [(4, 13), (-1, 3), (4, 4), (7, 4), (3, 4), (None, 4), (4.0, 7), ("4", 7)])
def test_characters_that_are_not_there(start: Any, end: Any) -> None:
    row = {"a": "the cat", "a1": 0, "a2": 3, "b": "the cat runs", "b1": start, "b2": end}
    with pytest.raises(DataError, match=r"row 2, columns 'b1' and 'b2': characters .* hold no word; allowed: 0 to 12"):
        texts(pair(), first_row=2, **row)


# -- cutting


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (13, "the red good cat good runs bad dog bad sleeps here"),
        (12, "the red good cat good runs bad dog bad sleeps"),
        (11, "the red good cat good runs bad dog bad"),
        (10, "red good cat good runs bad dog bad"),
        (9, "good cat good runs bad dog bad"),
        (8, "good cat good runs bad dog"),
    ],
)
def test_marked_words_are_cut_last(max_length: int, expected: str) -> None:
    row: dict[str, Any] = {"text": "the red cat runs dog sleeps here", "i": 2, "one": "cat", "j": 4, "two": "dog"}
    assert texts(task(WORDS), max_length, **row) == [expected.replace("here", "[UNK]")]


def test_both_texts_and_the_front_are_spared() -> None:
    row: dict[str, Any] = {"a": "the red cat runs", "a1": 8, "a2": 11, "b": "this cat sleeps", "b1": 5, "b2": 8}
    row["w"] = "cat"
    assert texts(pair(front=["w"]), 17, **row) == ["cat [UNK] the red good cat good runs", "this good cat good sleeps"]
    assert texts(pair(front=["w"]), 13, **row) == ["cat [UNK] red good cat good", "this good cat good"]
    assert texts(pair(front=["w"]), 11, **row) == ["cat [UNK] good cat good", "good cat good"]


# -- rows of the table, options, answers


def test_rows_of_the_table() -> None:
    wic: dict[str, Any] = {"word": "cat", "sentence1": "cat runs", "start1": 0, "end1": 3}
    wic |= {"sentence2": "this cat", "start2": 5, "end2": 8}
    assert texts(get_task("wic"), **wic) == ["cat [UNK] [UNK] cat [UNK] runs", "this [UNK] cat [UNK]"]
    assert build_kind(get_task("wic")).columns(True) == (
        *("sentence1", "sentence2", "word", "start1", "end1", "start2", "end2", "label"),
    )
    row: dict[str, Any] = {"span1_index": 0, "span1_text": "the cat", "span2_index": 3, "span2_text": "this"}
    (text,) = texts(get_task("wsc"), text="the cat plays this", **row)
    assert text == "the cat [UNK] this [UNK] [UNK] the cat [UNK] plays [UNK] this [UNK]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"task.options names 0 words in a text; allowed: 1 to 2, one for each of marks"),
        ({**WORDS, "marks": ["*"]}, r"task.options names 2 words in a text; allowed: 1 to 1"),
        ({**WORDS, "marks": "*#"}, r"task.options.marks is '\*#'; allowed: a list of texts"),
        ({**WORDS, "marks": ["*", " "]}, r"task.options.marks is \['\*', ' '\]; allowed: a list of texts"),
        ({"words": {"text": ["i"]}}, r"task.options.words is .*; allowed: text: a list of pairs of columns"),
        ({"words": {"other": ["i", "j"]}}, r"task.options.words is .*; allowed: text: a list of pairs of columns"),
        ({"characters": ["i", "j"]}, r"task.options.characters is .*; allowed: text: a list of pairs of columns"),
        ({**WORDS, "front": "word"}, r"task.options.front is 'word'; allowed: a list of different names"),
        ({**WORDS, "id": None}, r"task.options.id is None; allowed: a text"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(task(options))


@pytest.mark.parametrize("named", [True, False])
def test_labels_and_answers(named: bool) -> None:
    kind = build_kind(task({**WORDS, "id": "idx"} if named else WORDS))
    rows: dict[str, Any] = {
        "text": ["the cat", "the dog"],
        "i": [0, 0],
        "one": ["the"] * 2,
        "j": [1, 1],
        "two": ["cat", "dog"],
    }
    rows |= {"label": ["yes", 0], "idx": [7, 8]}
    columns = kind.encode(rows, toy_tokenizer(), 32, labelled=True, references=True)
    assert columns["labels"] == [1, 0]
    assert [json.loads(text) for text in columns.get("reference", [])] == ([{"id": 7}, {"id": 8}] if named else [])
    batch = batch_of_lists(columns, pad_token_id=0)
    answers = kind.answers(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), batch, MODEL)
    assert [answer["label"] for answer in answers] == ["yes", "no"]
    assert [answer.get("id") for answer in answers] == ([7, 8] if named else [None, None])


# -- whole


def test_toy_task_is_learned() -> None:
    module = build(FineTuneModule, task="toy_marked", dropout=0.0, backbone=tiny(0.0))
    fit = trainer(max_epochs=8, limit_val_batches=0)
    fit.fit(module, datamodule=data(batch_size=32, task="toy_marked"))
    assert fit.test(module, datamodule=data(task="toy_marked"), verbose=False)[0]["test/accuracy"] >= 0.95
    row = {"text": "the cat runs this dog eats", "index1": 1, "word1": "cat", "index2": 2, "word2": "runs"}
    assert module.predict([row])[0]["label"] == "together"
