"""Answers in groups."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import FineTuneModule
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.data.source import open_source
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task, get_task
from tests.reference import sets
from tests.toy import build, data, tiny, trainer

MODEL: Any = None  # this kind asks nothing of it


def task(**fields: Any) -> Task:
    options = {"group": ["p", "q"], "joined": ["answer"]} | fields.pop("options", {})
    settings = {"text": ("passage", "question"), "labels": ("wrong", "right"), "metrics": ("f1a", "em")}
    return Task(**{"kind": "grouped", "options": options, **settings, **fields})


def rows(*groups: tuple[Any, Any], **columns: Any) -> dict[str, Any]:
    count = len(groups)
    return {
        "passage": ["the cat is small"] * count,
        "question": ["this cat is"] * count,
        "answer": ["tiny"] * count,
        "label": [0] * count,
        "p": [group[0] for group in groups],
        "q": [group[1] for group in groups],
        **columns,
    }


def encode(task: Task, rows: dict[str, Any], **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_length": 32, "labelled": True, "references": True, **options}
    return {**build_kind(task).encode(rows, toy_tokenizer(), **settings)}


# -- encoding


def test_passage_and_question_with_answer_are_a_pair() -> None:
    columns = encode(task(options={"id": "number"}), rows((0, 1), number=[5], label=[1]))
    assert toy_tokenizer().decode(columns["input_ids"][0]) == "[CLS] the cat is small [SEP] this cat is tiny [SEP]"
    assert columns["token_type_ids"] == [[0] * 6 + [1] * 5]
    assert columns["labels"] == [1]
    assert json.loads(columns["reference"][0]) == {"p": 0, "q": 1, "number": 5}
    assert build_kind(task(options={"id": "number"})).columns(True) == (
        *("passage", "question", "answer", "p", "q", "number", "label"),
    )
    assert set(encode(task(), rows((0, 1)), labelled=False, references=False)) == {
        *("input_ids", "token_type_ids", "group"),
    }


def test_only_the_passage_is_cut() -> None:
    (tokens,) = encode(task(), rows((0, 1)), max_length=8)["input_ids"]
    assert toy_tokenizer().decode(tokens) == "[CLS] the [SEP] this cat is tiny [SEP]"
    (tokens,) = encode(task(options={"joined": []}), rows((0, 1)), max_length=8)["input_ids"]
    assert toy_tokenizer().decode(tokens) == "[CLS] the cat [SEP] this cat is [SEP]"
    (tokens,) = encode(task(text=("question",), options={"joined": []}), rows((0, 1)), max_length=4)["input_ids"]
    assert toy_tokenizer().decode(tokens) == "[CLS] this cat [SEP]"


GROUPS: list[tuple[Any, Any]] = [
    *((0, 0), (0, 1), (1, 0), (1, 1), (2**31 - 1, 0), (0, 2**31 - 1), (0, 2**31), (2**31, 0), (-1, 0), (0, -1)),
    *(("0", 0), (0, "0"), ("a", "b"), ("ab", ""), ("", "ab"), ("a,b", ""), ("a", "b,"), (0.0, 1.5), (True, "x")),
]


def test_a_group_is_one_number_and_no_other_groups() -> None:
    numbers = encode(task(), rows(*GROUPS))["group"]
    assert len(set(numbers)) == len(GROUPS) and all(0 <= number < 2**63 for number in numbers)
    later = encode(task(), rows(*GROUPS[::-1]), first_row=1000)["group"]
    assert later == numbers[::-1]


def test_one_or_three_columns_may_name_a_group() -> None:
    one = encode(task(options={"group": ["q"]}), rows((0, 7), (1, 7), (0, 8)))["group"]
    assert one[0] == one[1] != one[2]
    three = encode(task(options={"group": ["p", "q", "r"]}), rows((0, 1), (0, 1), (0, 1), r=[1, 2, 1]))["group"]
    assert three[0] == three[2] != three[1]


def test_groups_are_the_same_on_the_hub_and_in_files() -> None:
    """SuperGLUE has them inside a mapping on the hub."""
    multirc = get_task("multirc")
    text = {"paragraph": "the cat", "question": "this cat is", "answer": "tiny", "label": 1}
    index = {"paragraph": 3, "question": 4, "answer": 5}
    forms: tuple[dict[str, Any], ...] = ({"idx": index}, {f"idx_{name}": number for name, number in index.items()})
    names = build_kind(multirc).columns(True)
    read = []
    for form in forms:
        source = open_source(multirc, "train", {"train": [{**text, **form}]}, None)
        read.append(next(source.slices(names, 1, multirc.also)))
    assert read[0] == read[1]
    columns = encode(multirc, read[0])
    assert json.loads(columns["reference"][0]) == {"idx_paragraph": 3, "idx_question": 4, "idx_answer": 5}


def test_row_without_a_group() -> None:
    with pytest.raises(DataError, match=r"row 11 belongs to no question: \(0, None\); allowed: numbers or texts"):
        encode(task(), rows((0, 1), (0, None)), first_row=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": []}, r"task.options.group is \[\]; allowed: a list of 1 or more different names"),
        ({"joined": "answer"}, r"task.options.joined is 'answer'; allowed: a list of different names"),
        ({"id": 3}, r"task.options.id is 3; allowed: a text"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(task(options=options))


# -- metrics, answers


def test_metrics_over_batches() -> None:
    torch.manual_seed(0)
    every = ("f1a", "em", "accuracy", "f1", "macro_f1", "mcc")
    kind = build_kind(task(metrics=every))
    labels, outputs = torch.randint(2, (40,)).tolist(), torch.randn(40, 2)
    outputs[torch.arange(30), torch.tensor(labels[:30])] += 3
    questions = [(number % 3, number % 7) for number in range(40)]
    columns = encode(task(), rows(*questions, label=labels))
    metrics = kind.metrics()
    assert set(metrics) == set(every)
    for part in (slice(0, 11), slice(11, 40)):
        batch = batch_of_lists({name: values[part] for name, values in columns.items()}, pad_token_id=0)
        metrics.update(kind.predictions(outputs[part], batch, MODEL), kind.truths(batch))
    found = {name: value.item() for name, value in metrics.compute().items()}
    predicted = outputs.argmax(1).tolist()
    em = sets.questions_right(predicted, labels, questions)
    f1 = sets.f1_micro([{label} for label in predicted], [{label} for label in labels], [1])
    assert 0.2 < em < 0.9
    assert found["em"] == pytest.approx(em) and found["f1a"] == found["f1"] == pytest.approx(f1)
    assert found["accuracy"] == pytest.approx(sum(p == t for p, t in zip(predicted, labels, strict=True)) / 40)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("rouge",)}, r"task.metrics has 'rouge'; allowed for 2 classes: accuracy, .*, em, f1a"),
        ({"metrics": ("f1a",), "labels": ("a", "b", "c")}, r"task.metrics has 'f1a'; allowed for 3 classes: .*mcc, em"),
    ],
)
def test_wrong_metrics(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(task(**fields)).metrics()


def test_answers_name_their_question() -> None:
    batch = batch_of_lists(encode(task(options={"id": "n"}), rows((0, 1), (0, 2), n=["a", "b"])), pad_token_id=0)
    answers = build_kind(task()).answers(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), batch, MODEL)
    assert [{name: answer[name] for name in ("p", "q", "n", "label")} for answer in answers] == [
        {"p": 0, "q": 1, "n": "a", "label": "right"},
        {"p": 0, "q": 2, "n": "b", "label": "wrong"},
    ]
    assert answers[0]["probabilities"]["right"] > 0.99


def test_trivial_answer_suits_the_first_metric() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert_close(build_kind(task()).constant(labels), torch.tensor(1))
    assert_close(build_kind(task(metrics=("accuracy", "f1a"))).constant(labels), torch.tensor(0))


# -- whole


def test_toy_task_is_learned_and_beats_the_trivial_answer() -> None:
    module = build(FineTuneModule, task="toy_groups", dropout=0.0, backbone=tiny(0.0))
    fit = trainer(max_epochs=8, limit_val_batches=0)
    fit.fit(module, datamodule=data(batch_size=32, task="toy_groups"))
    found = fit.test(module, datamodule=data(task="toy_groups"), verbose=False)[0]
    assert found["test/f1a"] >= 0.95 and found["test/em"] >= 0.85
    trivial = baseline_scores(module, data(task="toy_groups"), "test")
    assert 0.5 < trivial["f1a"] < 0.85 and trivial["em"] < 0.6
