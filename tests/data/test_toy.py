"""The generated language."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_lightning.backbones.toy import TOY_VOCABULARY, toy_tokenizer
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import UsageError
from peft_lightning.tasks.table import get_task

TASKS = ["toy_sentiment", "toy_pairs", "toy_similarity"]
NEGATIONS, GOOD, BAD = {"not", "hardly"}, {"good", "clever", "brave"}, {"bad", "silly", "lazy"}
ANIMALS = {"cat", "dog", "horse", "fish"}
SIZES = ["tiny", "small", "average", "large", "huge"]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_repeatable_and_have_the_tasks_columns(task: str) -> None:
    rows = toy_rows(task, "train", size=50)
    assert rows == toy_rows(task, "train", size=50) == toy_rows(task, "train")[:50]
    assert rows != toy_rows(task, "train", size=50, seed=1)
    row = get_task(task)
    assert set(rows[0]) == {*row.text, row.label}
    assert {len(toy_rows(task, split)) for split in ("validation", "test")} == {256}
    assert len(toy_rows(task, "train")) == 2048


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_example(task: str) -> None:
    splits = [
        {tuple(row[c] for c in get_task(task).text) for row in toy_rows(task, split)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, splits)) == len(set.union(*splits))
    assert all(len(split) > 100 for split in splits)


def test_sentiment_is_the_tone_turned_round_by_a_negation() -> None:
    for row in toy_rows("toy_sentiment", "train"):
        words = set(row["text"].split())
        assert len(words & GOOD) + len(words & BAD) == 1
        assert row["label"] == (bool(words & GOOD) != bool(words & NEGATIONS))


def test_no_single_word_decides_sentiment() -> None:
    rows = toy_rows("toy_sentiment", "train")
    labels = Counter(row["label"] for row in rows)
    assert 0.45 < labels[1] / len(rows) < 0.55
    for word in set(" ".join(row["text"] for row in rows).split()):
        having = [row["label"] for row in rows if word in row["text"].split()]
        assert 0.25 < sum(having) / len(having) < 0.75, word


def test_pairs_speak_of_the_same_animal() -> None:
    for row in toy_rows("toy_pairs", "train"):
        first, second = ({*row[c].split()} & ANIMALS for c in ("sentence1", "sentence2"))
        assert row["label"] == int(first == second)


def test_similarity_is_how_close_two_sizes_are() -> None:
    for row in toy_rows("toy_similarity", "train"):
        first, second = (SIZES.index(row[c].split()[-1]) for c in ("sentence1", "sentence2"))
        assert row["label"] == 4.0 - abs(first - second)


@pytest.mark.parametrize("task", TASKS)
def test_tokenizer_knows_every_word(task: str) -> None:
    tokenizer = toy_tokenizer()
    for row in toy_rows(task, "train", size=300):
        for column in get_task(task).text:
            numbers = tokenizer(row[column])["input_ids"]
            assert tokenizer.unk_token_id not in numbers
            assert tokenizer.decode(numbers, skip_special_tokens=True) == row[column]


def test_tokenizer_is_like_berts() -> None:
    tokenizer = toy_tokenizer()
    assert tokenizer is toy_tokenizer()
    assert len(tokenizer) == len(TOY_VOCABULARY) == len(set(TOY_VOCABULARY))
    assert len(TOY_VOCABULARY) % 8 == 0
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id] == [0, 1, 4]
    pair = tokenizer("The CAT", "weasel")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == "[CLS] the cat [SEP] [UNK] [SEP]".split()
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert pair["attention_mask"] == [1] * 6


def test_unknown_task_and_split() -> None:
    with pytest.raises(UsageError, match="task is 'toy_poems'; allowed for generated data: toy_sentiment, toy"):
        toy_rows("toy_poems", "train")
    with pytest.raises(UsageError, match="split is 'dev'; allowed for generated data: train, validation, test"):
        toy_rows("toy_pairs", "dev")
