"""Few-shot data: which rows are drawn, for every kind, and what each stage reads."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.testing import assert_close

from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.data.supervised import TaskDataModule
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.table import Task, get_task
from tests.reference.shots import drawn

Row = dict[str, Any]
THREE = Task(name="three", labels=("bad", "fair", "good"))
WORDS = ("red", "dog", "cat", "eats", "the", "lazy")


def rows_of_three(count: int, seed: int = 0) -> list[Row]:
    """Short texts, some of them twice or with other case and spaces; the classes are 1 : 2 : 3."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(count):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 5)))
        change = rng.choice((str, str, str.upper, str.title, lambda text: f" {text}  "))
        rows.append({"text": change(text), "label": rng.choice((0, 1, 1, 2, 2, 2))})
    return rows


def module(task: Any = THREE, rows: Any = None, **options: Any) -> FewShotDataModule:
    """Few shots with the toy tokenizer; the same rows in every split unless they are given by split."""
    given = {"train": rows} if isinstance(rows, list) else rows
    return FewShotDataModule(task, **{"tokenizer": "toy", "rows": given, **options})


def like(row: Row) -> str:
    return " ".join(row["text"].casefold().split())


# -- which rows


@pytest.mark.parametrize("shots", [1, 4, 11])
def test_k_of_each_class_and_as_many_others_to_choose_by(shots: int) -> None:
    rows = rows_of_three(400)
    data = module(rows=rows, shots=shots)
    train, dev = ([rows[number] for number in data.numbers(stage)] for stage in ("train", "validation"))
    for part in (train, dev):
        assert Counter(row["label"] for row in part) == {0: shots, 1: shots, 2: shots}
    texts = [like(row) for row in train + dev]
    assert len(set(texts)) == len(texts) == 6 * shots


@pytest.mark.parametrize("seed", [0, 13, 87])
@pytest.mark.parametrize("mode", ["per_class", "total"])
def test_the_draw_is_the_oracles(mode: str, seed: int) -> None:
    rows = rows_of_three(300, seed)
    data = module(rows=rows, shots=7, shots_mode=mode, seeds=(seed,))
    expected = drawn(
        [{"text": row["text"]} for row in rows],
        [{THREE.labels[row["label"]]} for row in rows],
        [row["label"] for row in rows],
        THREE.labels if mode == "per_class" else (),
        shots=7,
        seed=seed,
    )
    assert (data.numbers("train"), data.numbers("validation")) == expected
    assert len(data.numbers("train")) == (21 if mode == "per_class" else 7)


def test_a_draw_for_ever() -> None:
    """Whatever changes these numbers changes every result with few shots."""
    data = FewShotDataModule("toy_sentiment", shots=3, tokenizer="toy")
    assert data.numbers("train") == [393, 1941, 1056, 296, 1110, 33]
    assert data.numbers("validation") == [956, 605, 1145, 524, 980, 1138]
    data.choose(100)
    assert data.numbers("train") == [642, 1268, 830, 759, 1395, 1345]


def test_neither_the_files_order_nor_its_words_for_labels_matter(tmp_path: Path) -> None:
    # the same inputs with the same label twice are one row as good as the other
    rows = list({like(row): row for row in rows_of_three(300)}.values())
    other = [{"label": THREE.labels[row["label"]], "text": row["text"]} for row in rows]
    random.Random(1).shuffle(other)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, other)))
    one = module(rows=rows, shots=5)
    two = module(root=str(tmp_path), shots=5)
    for stage in ("train", "validation"):
        texts = [[part[number]["text"] for number in data.numbers(stage)] for part, data in ((rows, one), (other, two))]
        assert texts[0] == texts[1]


def test_random_states_neither_matter_nor_change() -> None:
    rows, found = rows_of_three(200), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), _numpy_state(), random.getstate()
        found.append(module(rows=rows, shots=5, seed=seed).numbers("train"))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (_numpy_state(), random.getstate())
    assert found[0] == found[1]


def _numpy_state() -> Any:
    state: Any = np.random.get_state()
    return state[1].tolist()


def test_seeds_draw_different_rows_one_at_a_time(cache_dir: Path) -> None:
    data = module(rows=rows_of_three(400), shots=5, seeds=[3, 4])
    first = data.numbers("train"), data.labels("validation"), data.load("train").digest
    data.choose(4)
    assert data.shot_seed == 4 and data.numbers("train") != first[0] and data.load("train").digest != first[2]
    data.choose(3)
    assert (data.numbers("train"), data.load("train").digest) == (first[0], first[2])
    assert_close(data.labels("validation"), first[1])
    assert module(rows=rows_of_three(400), shots=5, seeds=[3, 4], shot_seed=4).shot_seed == 4


def test_rows_without_a_label_are_no_shots() -> None:
    task = dataclasses.replace(THREE, unlabelled=("-1",))
    rows: list[Row] = [{"text": f"cat {number}", "label": number % 4 - 1} for number in range(40)]
    numbers = module(task, rows, shots=5).numbers("train")
    assert all(rows[number]["label"] >= 0 for number in numbers)


# -- classes of other kinds


def test_so_many_sentences_of_each_type_of_entity() -> None:
    rng = random.Random(0)
    rows: list[Row] = []
    for _ in range(400):
        tags = [rng.choice(("O", "O", "O", "B-LIKED", "B-LIKED", "B-DISLIKED")) for _ in range(4)]
        rows.append({"tokens": [rng.choice(WORDS) for _ in tags], "label": tags})
    task = get_task("toy_tags")
    data = module(task, rows, shots=6)
    own = [{tag[2:] for tag in row["label"] if tag != "O"} for row in rows]
    targets = [[task.labels.index(tag) for tag in row["label"]] for row in rows]
    expected = drawn([{"tokens": row["tokens"]} for row in rows], own, targets, ("LIKED", "DISLIKED"), shots=6, seed=13)
    assert (data.numbers("train"), data.numbers("validation")) == expected
    for part in expected:
        counts = Counter(name for number in part for name in own[number])
        assert counts["DISLIKED"] == 6 <= counts["LIKED"]  # the rarer one is taken first, and exactly
        assert len(part) < 12 and not any(own[number] == set() for number in part)


def test_so_many_rows_of_each_of_several_labels() -> None:
    rows = toy_rows("toy_topics", "train", size=300)
    numbers = module("toy_topics", rows, shots=8).numbers("validation")
    counts = Counter(name for number in numbers for name in rows[number]["label"])
    assert min(counts[name] for name in get_task("toy_topics").labels) == 8
    assert len(numbers) < 16


@pytest.mark.parametrize("task", ["toy_similarity", "toy_choice", "toy_span", "toy_copy"])
def test_kinds_without_classes_have_shots_in_all_and_say_why(task: str, cache_dir: Path) -> None:
    data = module(task, shots=9)
    regime, kind = data.regime(), get_task(task).kind
    assert regime["shots_mode"] == "total" and regime["train"] == regime["validation"] == 9
    assert regime["reason"] == f"kind {kind} has no classes to draw 9 rows of each"
    data.setup("fit")
    assert [len(data.load(stage)) for stage in ("train", "validation")] == [9, 9]
    assert module(task, shots=9, shots_mode="total").regime()["reason"] == ""


@pytest.mark.parametrize("task", [name for name in ("toy_sentiment", "toy_marked", "toy_groups", "toy_tags")])
def test_every_toy_task_is_read_as_its_rows_would_be(task: str, cache_dir: Path) -> None:
    """Encoding, references and order are those of the ordinary data module over the chosen rows."""
    data, rows = module(task, shots=4, batch_size=3), toy_rows(task, "train")
    plain = TaskDataModule(
        task,
        tokenizer="toy",
        batch_size=3,
        rows={stage: [rows[number] for number in data.numbers(stage)] for stage in ("train", "validation")},
    )
    for stage in ("train", "validation"):
        for one, other in zip(data.loader(stage), plain.loader(stage), strict=True):
            assert one.keys() == other.keys()
            assert_close(dict(one["inputs"]), dict(other["inputs"]), rtol=0, atol=0)
            assert_close((one["labels"], one["rows"]), (other["labels"], other["rows"]), rtol=0, atol=0)
            assert one.get("references") == other.get("references")


def test_one_answer_of_a_question() -> None:
    rows = [
        {"paragraph": f"the cat {p}", "question": "who", "answer": f"dog {a}", "label": a % 2}
        for p in range(20)
        for a in range(4)
    ]
    data = module("toy_groups", rows, shots=5)
    questions = [rows[number]["paragraph"] for stage in ("train", "validation") for number in data.numbers(stage)]
    assert len(questions) == 20 and len(set(questions)) == 20


# -- shortage


@pytest.mark.parametrize(
    ("counts", "mode", "message"),
    [
        ((4, 9, 9), "per_class", "class 'bad' has 4 different rows for the shots; wanted: 5"),
        ((0, 9, 9), "per_class", "class 'bad' has 0 different rows for the shots; wanted: 5"),
        ((20, 8, 20), "per_class", "class 'fair' has 3 different rows for the dev shots beside the shots; wanted: 5"),
        ((2, 1, 1), "total", "has 4 different rows for the shots; wanted: 5"),
        ((2, 3, 4), "total", "has 4 different rows for the dev shots beside the shots; wanted: 5"),
    ],
)
def test_too_few_rows(counts: tuple[int, ...], mode: str, message: str) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    with pytest.raises(DataError, match=rf"^rows\['train'\]: {message}$"):
        module(rows=rows, shots=5, shots_mode=mode).setup("fit")


def test_the_same_text_again_does_not_count() -> None:
    rows = [{"text": text, "label": label} for label, text in enumerate(("a", "b", "c")) for _ in range(9)]
    with pytest.raises(DataError, match="class 'bad' has 1 different rows for the shots; wanted: 2"):
        module(rows=rows, shots=2).numbers("train")


def test_a_wrong_label_names_its_row() -> None:
    rows = [*rows_of_three(20), {"text": "cat", "label": "great"}]
    with pytest.raises(DataError, match=r"rows\['train'\]: row 20, column 'label': the label is 'great'; allowed: 0"):
        module(rows=rows, shots=1).numbers("train")


# -- stages


def test_fit_does_not_touch_the_evaluation_split_and_test_reads_nothing_else(cache_dir: Path) -> None:
    train, evaluation = rows_of_three(200), rows_of_three(30, seed=5)
    data = module(rows={"train": train}, shots=4)
    data.setup("fit")
    data.setup("validate")
    assert sorted(data.labels("validation").tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(DataError, match="rows has no split 'test'"):
        data.setup("test")
    data = module(rows={"train": train, "validation": [{"text": "x", "label": 0}], "test": evaluation}, shots=4)
    data.setup("test")
    assert data.labels("test").tolist() == [row["label"] for row in evaluation]
    glue = module("sst2", rows={"train": [], "validation": [{"sentence": "cat", "label": 1}]})
    assert glue.labels("test").tolist() == [1]


def test_a_fixed_part_of_the_evaluation_split(cache_dir: Path) -> None:
    rows = [{"text": f"cat {number}", "label": number % 3} for number in range(90)]
    given = {"train": rows, "test": rows}
    found = []
    for seed in (13, 21):
        data = module(rows=given, shots=2, shot_seed=seed, test_rows=20, seed=seed)
        data.setup("test")
        found.append([row["label"] for row in rows if row["text"] in _texts(data.source("test").read())])
        assert len(data.load("test")) == 20
    assert found[0] == found[1]
    texts = [row["text"] for row in data.source("test").read()]
    assert texts == sorted(texts, key=lambda text: int(text.split()[1])) and texts != [r["text"] for r in rows[:20]]
    assert len(module(rows=given, test_rows=500).load("test")) == 90


def _texts(rows: Any) -> set[str]:
    return {row["text"] for row in rows}


def test_questions_stay_whole_in_a_part_of_the_evaluation_split() -> None:
    rows = [
        {"paragraph": f"the cat {p}", "question": "who", "answer": f"dog {a}", "label": a % 2}
        for p in range(20)
        for a in range(3)
    ]
    data = module("toy_groups", {"train": rows, "test": rows}, test_rows=20)
    chosen = Counter(row["paragraph"] for row in data.source("test").read())
    assert set(chosen.values()) == {3} and sum(chosen.values()) == 18
    with pytest.raises(DataError, match="a question has more rows than test_rows = 2; allowed: more"):
        module("toy_groups", {"test": rows}, test_rows=2).source("test")


# -- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots is 0; allowed: at least 1"),
        ({"shots": True}, "shots is True; allowed: a whole number"),
        ({"shots_mode": "each"}, "shots_mode is 'each'; allowed: per_class, total"),
        ({"seeds": []}, r"seeds is \[\]; allowed: a list of different whole numbers"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; allowed: a list of different whole numbers"),
        ({"seeds": "13"}, "seeds is '13'; allowed: a list of different whole numbers"),
        ({"seeds": [-1]}, "seeds is -1; allowed: at least 0"),
        ({"shot_seed": 5}, "shot_seed is 5; allowed: one of seeds, 13, 21, 42, 87, 100"),
        ({"test_rows": 0}, "test_rows is 0; allowed: at least 1"),
        ({"calibration": "all"}, "calibration is 'all'; allowed: shots, pool"),
        ({"calibration_rows": 0}, "calibration_rows is 0; allowed: at least 1"),
        ({"batch_size": 0}, "batch_size is 0; allowed: at least 1"),
        ({"splits": {"test": "train"}}, "splits: test and train both read 'train', so that shots would be tested on"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module(**options)


# -- what is read without labels


def test_shots_are_calibrated_on_unless_the_pool_is_asked_for(cache_dir: Path) -> None:
    rows = rows_of_three(400)
    for calibration, count in (("shots", 15), ("pool", 40)):
        data = module(rows=rows, shots=5, calibration=calibration, calibration_rows=40)
        assert len(data.unlabelled("train")) == count and len(data.unlabelled("validation")) == 15
        batches = list(data.calibration_dataloader())
        assert sum(len(batch["rows"]) for batch in batches) == count
        assert not any("labels" in batch for batch in batches)


def test_the_pool_has_no_shot_and_no_dev_shot_and_no_text_twice() -> None:
    rows = rows_of_three(400)
    data = module(rows=rows, shots=5, calibration="pool", calibration_rows=60)
    shown = {like(rows[number]) for stage in ("train", "validation") for number in data.numbers(stage)}
    read: Any = data.source("pool").read()
    pool = [like(row) for row in read]
    assert len(pool) == len(set(pool)) == 60 and not shown & set(pool)
    order = data.pool.order(data.shot_seed)
    expected = [like(rows[row]) for row in order if like(rows[row]) not in shown]
    assert pool == list(dict.fromkeys(expected))[:60]
    more: Any = module(rows=rows, shots=5, calibration="pool", calibration_rows=10**6).source("pool").read()
    assert {like(row) for row in more} == {like(row) for row in rows} - shown


def test_another_seed_has_another_pool(cache_dir: Path) -> None:
    data = module(rows=rows_of_three(400), shots=5, calibration="pool", seeds=(1, 2), calibration_rows=30)
    digests = []
    for seed in (1, 2, 1):
        data.choose(seed)
        digests.append(data.unlabelled("train").digest)
    assert digests[0] == digests[2] != digests[1]
    assert data.regime()["calibration"] == "pool" and data.regime()["calibration_rows"] == 30


def test_labels_of_the_pool_change_nothing() -> None:
    """They decide which rows are shots; of the others they are not read."""
    rows = rows_of_three(400)
    data = module(rows=rows, shots=5, calibration="pool", calibration_rows=40)
    assert set(data.unlabelled("train").scalars) | set(data.unlabelled("train").ragged) == {
        "input_ids",
        "token_type_ids",
    }


def test_demonstrations_are_shown_in_the_pool_too(cache_dir: Path) -> None:
    rows = {split: toy_rows("toy_sentiment", split, size=80) for split in ("train", "validation", "test")}
    data = module("toy_sentiment+prompt-demo", rows, shots=2, calibration="pool", calibration_rows=5, max_length=64)
    assert "sizes" in data.unlabelled("train").ragged and len(data.unlabelled("train")) == 5


def test_an_empty_pool() -> None:
    rows = [{"text": f"{word} {number}", "label": label} for number in range(2) for label, word in enumerate("abc")]
    with pytest.raises(DataError, match="has no row beside the shots and the dev shots; wanted: 9"):
        module(rows=rows, shots=1, calibration="pool", calibration_rows=9).source("pool")


def test_only_stages_that_read_shots_have_numbers() -> None:
    with pytest.raises(UsageError, match="stage is 'test'; allowed: train, validation, which read shots"):
        module().numbers("test")


def test_a_configuration_knows_the_options_of_both_classes() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FewShotDataModule, "data")
    given = parser.parse_args(["--data.task", "sst2", "--data.shots", "20", "--data.max_length", "64"])
    assert (given.data.shots, given.data.max_length, given.data.batch_size) == (20, 64, 32)
    assert parser.parse_args(["--data.task", "sst2", "--data.seeds", "[1, 2]"]).data.seeds == [1, 2]


# -- real data


@pytest.mark.real_data
@pytest.mark.parametrize("task", ["sst2", "mrpc", "mnli", "rotten_tomatoes", "conll2003", "multirc", "commonsense_qa"])
def test_real_tasks(task: str, shared_data: Path) -> None:
    data = FewShotDataModule(task, shots=10, root=str(shared_data), tokenizer="toy")
    assert not set(data.numbers("train")) & set(data.numbers("validation"))
    for stage in ("train", "validation"):
        rows: Any = data.source(stage).read()
        labels = [row[data.task.label] for row in rows]
        counts = Counter(
            name for label in labels if data.kind.classes() for name in data.kind.classes(data.kind.target(label))
        )
        assert min(counts[name] for name in data.kind.classes()) == 10 if data.kind.classes() else len(rows) == 10
