"""The kinds of task, and one that comes from outside the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAccuracy

from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.layers.heads import ClassificationHead
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Kind, Model, build_kind
from peft_lightning.tasks.kinds.classify import Classify
from peft_lightning.tasks.kinds.regress import Regress
from peft_lightning.tasks.table import Task, get_task


class ManyLabels(Kind):
    """A kind from outside: any number of classes per text."""

    trivial = "what most have"

    @property
    def num_outputs(self) -> int:
        return len(self.task.labels)

    def target(self, value: Any) -> list[int]:
        return [int(name in value) for name in self.task.labels]

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        loss_BC = F.binary_cross_entropy_with_logits(outputs.float(), batch["labels"].float(), reduction="none")
        return loss_BC.sum(1), loss_BC.new_full((len(loss_BC),), self.num_outputs)

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Tensor:
        return (outputs > 0).long()

    def metrics(self) -> MetricCollection:
        return MetricCollection({"accuracy": MultilabelAccuracy(self.num_outputs)})

    def constant(self, labels: Tensor) -> Tensor:
        return labels.float().mean(0).round()

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        return [{"labels": [n for n, z in zip(self.task.labels, row, strict=True) if z > 0]} for row in outputs]


class NoKind:
    """Something else."""


HERE = f"{__name__}.ManyLabels"
MODEL: Any = None  # these kinds ask nothing of it
WIDTH_8: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=8))
THREE = Task(name="three", labels=("bad", "fair", "good"))
SCORE = Task(name="score", kind="regress", metrics=("pearson",))


def encode(task: Task, rows: Mapping[str, Any], **options: Any) -> dict[str, Sequence[Any]]:
    """Encode ``rows`` with the toy tokenizer."""
    settings: dict[str, Any] = {"max_length": 16, "labelled": True, **options}
    return build_kind(task).encode(rows, toy_tokenizer(), **settings)


def test_records_hold_what_json_does_not_know_as_text() -> None:
    columns: dict[str, list[Any]] = {"id": [date(2024, 2, 29), 7], "text": ["é", None]}
    found = [json.loads(record) for record in Kind.records(columns)]
    assert found == [{"id": "2024-02-29", "text": "é"}, {"id": 7}]


# -- finding a kind


def test_kinds_are_found_by_name() -> None:
    assert type(build_kind(THREE)) is Classify
    assert type(build_kind(SCORE)) is Regress
    inside = Task(kind="peft_lightning.tasks.kinds.classify.Classify", labels=("a", "b"))
    assert type(build_kind(inside)) is Classify


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("klassify", r"task.kind is 'klassify'; allowed: .*classify, .*regress, .*or package.module.Class"),
        ("base", r"task.kind is 'base'; allowed: .*classify, .*regress"),
        ("no_such_package.Kind", r"task.kind = 'no_such_package.Kind': is of none of the packages peft_l"),
        ("peft_lightning.nothing.Kind", r"task.kind = 'peft_lightning.nothing.Kind': cannot be imported \(No module"),
        (f"{__name__}.Missing", r"task.kind = '.*Missing': must be a subclass of .*kinds.base.Kind"),
        (f"{__name__}.NoKind", r"task.kind = '.*NoKind': must be a subclass of .*kinds.base.Kind"),
    ],
)
def test_unknown_kinds(kind: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(Task(kind=kind, labels=("a", "b")))


def test_kind_from_outside_works_whole() -> None:
    task = Task(kind=HERE, labels=("x", "y", "z"))
    kind = build_kind(task)
    columns = encode(task, {"text": ["the cat", "the dog"], "label": [["x", "z"], []]})
    labels = torch.tensor(columns["labels"])
    assert columns["labels"] == [[1, 0, 1], [0, 0, 0]]
    head = kind.head(WIDTH_8, "linear", 0.0)
    logits = head(torch.randn(2, 4, 8))
    losses, weights = kind.losses(logits, {"labels": labels}, None)
    assert losses.shape == weights.shape == (2,) and weights.sum() == 6
    metrics = kind.metrics()
    metrics.update(kind.predictions(logits, {}, MODEL), labels)
    assert set(metrics.compute()) == {"accuracy"}
    assert kind.answers(torch.tensor([[1.0, -1.0, 2.0]]), {}, MODEL) == [{"labels": ["x", "z"]}]


# -- encoding


def test_one_text_is_encoded() -> None:
    words = toy_tokenizer().convert_tokens_to_ids(["[CLS]", "the", "cat", "[SEP]"])
    columns = encode(THREE, {"text": ["the cat", "cat"], "label": [2, "bad"]})
    assert columns == {
        "input_ids": [words, [words[0], words[2], words[3]]],
        "token_type_ids": [[0] * 4, [0] * 3],
        "labels": [2, 0],
    }


def test_two_texts_are_encoded_as_a_pair_and_cut() -> None:
    task = get_task("toy_similarity")
    rows = {"sentence1": ["the cat runs"], "sentence2": ["the dog"], "label": [2]}
    tokenizer = toy_tokenizer()
    columns = encode(task, rows)
    expected = ["[CLS]", "the", "cat", "runs", "[SEP]", "the", "dog", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(columns["input_ids"][0]) == expected
    assert columns["token_type_ids"] == [[0] * 5 + [1] * 3]
    assert columns["labels"] == [2.0] and isinstance(columns["labels"][0], float)
    assert len(encode(task, rows, max_length=6)["input_ids"][0]) == 6


def test_unlabelled_rows_need_no_label() -> None:
    assert set(encode(THREE, {"text": ["the cat"]}, labelled=False)) == {"input_ids", "token_type_ids"}
    assert build_kind(THREE).columns(labelled=False) == ("text",)
    assert build_kind(THREE).columns(labelled=True) == ("text", "label")


@pytest.mark.parametrize("text", [None, 3, ["the", "cat"]])
def test_text_that_is_no_string_names_the_row(text: Any) -> None:
    with pytest.raises(DataError, match=r"row 1001, column 'text': .* is not a text"):
        encode(THREE, {"text": ["cat", text], "label": [0, 0]}, first_row=1000)


@pytest.mark.parametrize("label", [3, -1, None, 1.0, "great", "3", "-1", "", True])
def test_classify_refuses_a_label(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 0, column 'label': .*; allowed: 0 to 2, or one of bad, fair, good"):
        encode(THREE, {"text": ["cat"], "label": [label]})


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("true", "false"), (True, False)),
        (("true", "false"), ("true", "false")),
        (("1", "0"), (1, 0)),
        (("1", "0"), ("1", "0")),
        (("1", "2"), (1, 2)),
        (("1", "2"), ("1", "2")),
        (("no", "yes"), ("0", "1")),
        (("no", "yes"), (False, True)),
    ],
)
def test_a_class_name_comes_before_a_number(names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    kind = build_kind(Task(labels=names))
    assert [kind.target(value) for value in values] == [0, 1]


def test_classify_accepts_names_numbers_and_booleans() -> None:
    kind = build_kind(Task(labels=("no", "yes")))
    values: list[Any] = ["no", "yes", 0, 1, False, True, np.int64(1)]
    assert [kind.target(value) for value in values] == [0, 1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("label", [None, "3.0", float("nan"), float("inf"), True])
def test_regress_refuses_a_label(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 5, column 'label': the label is .*; allowed: a finite number"):
        encode(SCORE, {"text": ["cat"], "label": [label]}, first_row=5)


# -- losses, predictions, answers


def test_classify_loss_is_a_weighted_sum() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 2, 1])
    weights = torch.tensor([1.0, 2.0, 0.5])
    kind = build_kind(THREE)
    for class_weights in (None, weights):
        losses, weights_B = kind.losses(logits, {"labels": labels}, class_weights)
        loss, weight = losses.sum(), weights_B.sum()
        assert losses.shape == weights_B.shape == (5,)
        expected = 0.0
        for row, label in zip(logits.float(), labels, strict=True):
            factor = 1.0 if class_weights is None else float(class_weights[label])
            expected += factor * float(row.exp().sum().log() - row[label])
        assert loss.dtype == weight.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert weight.item() == pytest.approx(5.0 if class_weights is None else weights[labels].sum().item())


@pytest.mark.parametrize("task", [THREE, SCORE])
def test_sums_of_uneven_parts_add_up(task: Task) -> None:
    kind = build_kind(task)
    logits = torch.randn(7, kind.num_outputs)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    parts = [
        kind.losses(logits[part], {"labels": labels[part]}, None) for part in (slice(0, 5), slice(5, 7), slice(7, 7))
    ]
    together = kind.losses(logits, {"labels": labels}, None)
    for number in (0, 1):
        assert_close(torch.cat([part[number] for part in parts]), together[number])


def test_regress_loss_is_squared_error() -> None:
    batch = {"labels": torch.tensor([0.0, 1.0])}
    losses, weights = build_kind(SCORE).losses(torch.tensor([[1.0], [3.0]]), batch, None)
    assert_close((losses, weights), (torch.tensor([1.0, 4.0]), torch.ones(2)))


def test_answers() -> None:
    answer = build_kind(THREE).answers(torch.tensor([[0.0, 1.0, 0.0]]), {}, MODEL)[0]
    assert answer["label"] == "fair"
    assert list(answer["probabilities"]) == ["bad", "fair", "good"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
    assert build_kind(SCORE).answers(torch.tensor([[2.5]]), {}, MODEL) == [{"score": 2.5}]
    assert_close(build_kind(THREE).predictions(torch.tensor([[0.0, 1.0, 0.0]]), {}, MODEL), torch.tensor([1]))
    assert_close(build_kind(SCORE).predictions(torch.tensor([[2.5]]), {}, MODEL), torch.tensor([2.5]))


def test_constant_predictions() -> None:
    assert_close(build_kind(THREE).constant(torch.tensor([2, 1, 2, 1, 0])), torch.tensor(1))
    assert_close(build_kind(SCORE).constant(torch.tensor([1.0, 2.0, 6.0])), torch.tensor(3.0))


def test_head_has_the_kinds_width() -> None:
    head = build_kind(THREE).head(WIDTH_8, "dense", 0.1)
    assert isinstance(head, ClassificationHead)
    assert head(torch.randn(2, 5, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(labels=("a",)), r"task.labels is \['a'\]; allowed for kind classify: two names or more"),
        (Task(kind="regress", labels=("a", "b")), r"task.labels is .*; allowed for kind regress: none"),
    ],
)
def test_wrong_labels_for_the_kind(task: Task, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(task)


def test_options_that_a_kind_does_not_know() -> None:
    with pytest.raises(UsageError, match="task.options has 'stride'; allowed for kind classify: none"):
        build_kind(Task(labels=("a", "b"), options={"stride": 1}))


def test_regress_refuses_class_weights() -> None:
    with pytest.raises(UsageError, match="class_weights is set; allowed for kind regress: null"):
        build_kind(SCORE).losses(torch.zeros(1, 1), {"labels": torch.zeros(1)}, torch.ones(1))
