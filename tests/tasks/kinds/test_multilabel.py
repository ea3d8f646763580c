"""Any number of classes a text."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from peft_lightning import FineTuneModule
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.kinds.multilabel import MultiLabel
from peft_lightning.tasks.table import Task
from tests.reference import sets
from tests.toy import build, data, tiny, trainer

MODEL: Any = None  # this kind asks nothing of it
LABELS = ("joy", "fear", "rage")


def kind(**fields: Any) -> MultiLabel:
    settings = {"kind": "multilabel", "labels": LABELS, "metrics": ("f1_micro", "f1_macro", "accuracy")}
    found = build_kind(Task(**{**settings, **fields}))
    assert type(found) is MultiLabel
    return found


# -- encoding


@pytest.mark.parametrize(
    ("label", "target"),
    [
        ([], [0, 0, 0]),
        (["rage", "joy"], [1, 0, 1]),
        ([2, 0], [1, 0, 1]),
        (["2", "joy"], [1, 0, 1]),
        (("fear",), [0, 1, 0]),
        (np.array([1, 2]), [0, 1, 1]),
    ],
)
def test_labels(label: Any, target: list[int]) -> None:
    assert kind().target(label) == target


@pytest.mark.parametrize("label", [None, "joy", 1, {"joy": 1}, ["hope"], [3], [-1], [True, False], [None], [[0]]])
def test_labels_that_are_none(label: Any) -> None:
    rows = {"text": ["cat"], "label": [label]}
    with pytest.raises(DataError, match=r"row 9, column 'label': the label is .*; allowed: "):
        kind().encode(rows, toy_tokenizer(), 16, labelled=True, first_row=9)


@pytest.mark.parametrize("label", [[1, 0, 0], [0, 0, 0], [2, "2"], ["joy", "joy"]])
def test_a_0_or_1_for_each_class_is_refused(label: Any) -> None:
    with pytest.raises(DataError, match=r"class \w+ twice; allowed: each class once, by name or number \(not a 0"):
        kind().target(label)


def test_rows_keep_their_id() -> None:
    named = kind(options={"id": "key"})
    rows: dict[str, list[Any]] = {"text": ["the cat", "cat"], "label": [["joy"], []], "key": ["a", "b"]}
    columns = named.encode(rows, toy_tokenizer(), 16, labelled=True, references=True)
    assert columns["labels"] == [[1, 0, 0], [0, 0, 0]]
    assert named.columns(True) == ("text", "key", "label") and kind().columns(False) == ("text",)
    references = [json.loads(text) for text in columns["reference"]]
    assert references == [{"id": "a"}, {"id": "b"}]
    answers = named.answers(torch.zeros(2, 3), {"references": references}, MODEL)
    assert [answer["id"] for answer in answers] == ["a", "b"]


# -- losses, predictions, answers


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
def test_loss_is_the_mean_of_the_classes(weights: list[float] | None) -> None:
    logits = torch.randn(5, 3, dtype=torch.bfloat16)
    labels = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 1]])
    class_weights = None if weights is None else torch.tensor(weights)
    losses, weights_B = kind().losses(logits, {"labels": labels}, class_weights)
    assert losses.dtype == weights_B.dtype == torch.float32
    assert_close(weights_B, torch.ones(5))
    for loss, row, label in zip(losses.tolist(), logits.tolist(), labels.tolist(), strict=True):
        terms = [-math.log(1 / (1 + math.exp(-z if y else z))) for z, y in zip(row, label, strict=True)]
        factors = weights or [1.0] * 3
        expected = sum(w * t for w, t in zip(factors, terms, strict=True)) / sum(factors)
        assert loss == pytest.approx(expected, rel=1e-5)
    part, _ = kind().losses(logits[2:4], {"labels": labels[2:4]}, class_weights)
    assert_close(part, losses[2:4])
    assert kind().losses(logits[:0], {"labels": labels[:0]}, class_weights)[0].shape == (0,)


def test_a_class_is_predicted_above_the_threshold() -> None:
    logits = torch.tensor([[-1.0, 0.0, 1.0], [3.0, -3.0, -3.0], [-3.0, -3.0, -3.0]])
    assert_close(kind().predictions(logits, {}, MODEL), torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0]]))
    low = kind(options={"threshold": 0.25})
    assert_close(low.predictions(logits, {}, MODEL), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]))
    first, second, third = low.answers(logits, {}, MODEL)
    assert first["labels"] == list(LABELS) and second["labels"] == ["joy"] and third["labels"] == []
    assert first["probabilities"] == pytest.approx({"joy": 0.268941, "fear": 0.5, "rage": 0.731059}, abs=1e-5)


def test_metrics() -> None:
    torch.manual_seed(0)
    true, logits = torch.randint(2, (30, 3)), torch.randn(30, 3)
    logits += 2 * true
    metrics = kind().metrics()
    for part in (slice(0, 7), slice(7, 30)):
        metrics.update(kind().predictions(logits[part], {}, MODEL), true[part])
    found = {name: value.item() for name, value in metrics.compute().items()}
    predicted, expected = ([{c for c in range(3) if row[c] > 0} for row in rows.tolist()] for rows in (logits, true))
    assert found == pytest.approx(
        {
            "f1_micro": sets.f1_micro(predicted, expected, range(3)),
            "f1_macro": sets.f1_macro(predicted, expected, range(3)),
            "accuracy": sets.exact(predicted, expected),
        }
    )
    assert len(set(found.values())) == 3


def test_trivial_answer() -> None:
    labels = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert_close(kind().constant(labels), torch.tensor([1, 0, 1]))
    assert_close(kind().constant(torch.tensor([[0, 1], [0, 0], [0, 0]])), torch.tensor([0, 1]))


# -- options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("a",)}, r"task.labels is \['a'\]; allowed for kind multilabel: two names or more"),
        ({"options": {"threshold": 1.0}}, r"task.options.threshold is 1.0; allowed: a number between 0 and 1"),
        ({"options": {"threshold": "half"}}, r"task.options.threshold is 'half'; allowed: a number between 0 and 1"),
        ({"options": {"id": 1}}, r"task.options.id is 1; allowed: a text"),
        ({"options": {"window": 1}}, r"task.options has 'window'; allowed for kind multilabel: threshold, id"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**fields)


def test_wrong_metric() -> None:
    with pytest.raises(UsageError, match="task.metrics has 'f1'; allowed for kind multilabel: f1_micro, f1_macro, ac"):
        kind(metrics=("f1",)).metrics()


def test_others_are_not_told_of_its_head() -> None:
    assert not kind().classifies


# -- whole


def test_toy_task_is_learned() -> None:
    module = build(FineTuneModule, task="toy_topics", dropout=0.0, backbone=tiny(0.0))
    fit = trainer(max_epochs=8, limit_val_batches=0)
    fit.fit(module, datamodule=data(batch_size=32, task="toy_topics"))
    found = fit.test(module, datamodule=data(task="toy_topics"), verbose=False)[0]
    assert found["test/accuracy"] >= 0.95 and found["test/f1_micro"] >= 0.95
    assert module.predict([("this cat is tiny", "the dog is large")])[0]["labels"] == ["growth"]
    trivial = baseline_scores(module, data(task="toy_topics"), "test")
    assert 0.4 < trivial["f1_micro"] < 0.75
