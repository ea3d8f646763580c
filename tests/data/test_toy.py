"""The generated language."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_lightning.backbones.toy import TOY_VOCABULARY, toy_tokenizer
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import UsageError
from peft_lightning.tasks.table import get_task

TASKS = ["toy_sentiment", "toy_pairs", "toy_similarity", "toy_span", "toy_copy"]
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
    assert len(tokenizer) == len(TOY_VOCABULARY) == len(set(TOY_VOCABULARY))
    assert len(TOY_VOCABULARY) % 8 == 0
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id] == [0, 1, 4]
    tokenizer.add_tokens(["weasel"])  # it is the caller's own
    tokenizer = toy_tokenizer()
    pair = tokenizer("The CAT", "weasel")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == "[CLS] the cat [SEP] [UNK] [SEP]".split()
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert pair["attention_mask"] == [1] * 6


def test_unknown_task_and_split() -> None:
    with pytest.raises(UsageError, match="task is 'toy_poems'; allowed for generated data: toy_sentiment, toy"):
        toy_rows("toy_poems", "train")
    with pytest.raises(UsageError, match="split is 'dev'; allowed for generated data: train, validation, test"):
        toy_rows("toy_pairs", "dev")


def test_a_copy_is_the_text() -> None:
    rows = toy_rows("toy_copy", "train")
    assert all(row["copy"] == row["text"] for row in rows)
    assert {len(row["text"].split()) for row in rows} == {5, 6}


def test_choice_names_the_animal_of_the_question() -> None:
    rows = toy_rows("toy_choice", "train")
    for row in rows:
        (animal,) = {*row["question"].split()} & ANIMALS
        assert [animal in choice.split() for choice in row["choices"]].index(True) == row["label"]
        assert sum(animal in choice.split() for choice in row["choices"]) == 1
    assert {len(row["choices"]) for row in rows} == {2, 3, 4}


def test_groups_compare_sizes() -> None:
    rows = toy_rows("toy_groups", "validation")
    for row in rows:
        limit, size = (SIZES.index(row[column].split()[-1]) for column in ("paragraph", "answer"))
        assert row["label"] == int(size <= limit)
    questions = Counter((row["paragraph"], row["question"]) for row in rows)
    assert max(questions.values()) > 3 and len(questions) > 50


def test_marked_words_are_of_one_part_or_not() -> None:
    rows = toy_rows("toy_marked", "train")
    for row in rows:
        words = row["text"].split()
        assert words[row["index1"]] == row["word1"] and words[row["index2"]] == row["word2"]
        assert row["label"] == int(row["index2"] == row["index1"] + 1)
    for name in ("index1", "index2"):
        for place in {row[name] for row in rows}:
            having = [row["label"] for row in rows if row[name] == place]
            assert 0.25 < sum(having) / len(having) < 0.75


def test_topics_are_the_order_and_the_sum_of_sizes() -> None:
    rows = toy_rows("toy_topics", "train")
    for row in rows:
        first, second = (SIZES.index(row[column].split()[-1]) for column in ("sentence1", "sentence2"))
        assert row["label"] == [name for name, yes in (("growth", second > first), ("bulk", first + second > 4)) if yes]
    assert {len(row["label"]) for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("task", ["toy_choice", "toy_groups", "toy_marked", "toy_topics"])
def test_splits_of_rows_with_several_columns_share_no_example(task: str) -> None:
    splits = [
        {str({name: value for name, value in row.items() if name != "label"}) for row in toy_rows(task, split)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, splits)) == len(set.union(*splits))
    assert all(len(split) > 100 for split in splits)
