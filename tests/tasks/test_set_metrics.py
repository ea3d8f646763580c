"""Metrics of answers that are more than one class, against slow counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchmetrics import Metric

from peft_lightning.tasks.metrics import ConfusionMetric, build_metrics
from peft_lightning.tasks.set_metrics import AnswerMetric, ExactMetric, GroupMetric, LabelF1Metric
from tests.reference import sets

C, ROWS = 4, 57


def sets_of(rows: Tensor) -> list[set[int]]:
    return [{label for label, yes in enumerate(row) if yes} for row in rows.tolist()]


@pytest.fixture
def labels() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    predicted, true = (torch.rand(ROWS, C) < torch.tensor([0.1, 0.4, 0.7, 0.0]) for _ in range(2))
    true[:20] = predicted[:20]
    return predicted.long(), true.long()


@pytest.fixture
def answers() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    true, question = torch.randint(2, (ROWS,)), torch.randint(25, (ROWS,)) * (1 << 57)
    predicted = torch.where(torch.rand(ROWS) < 0.2, 1 - true, true)
    return predicted, torch.stack([true, question], 1)


def value(metric: Metric, *parts: tuple[Tensor, Tensor]) -> Any:
    for part in parts:
        metric.update(*part)
    return metric.compute()


def expect(found: Tensor, expected: float) -> None:
    assert found.dtype == torch.float32
    assert_close(found.item(), expected, rtol=1e-6, atol=0)


def test_exact_matches(labels: tuple[Tensor, Tensor]) -> None:
    predicted, true = labels
    expected = sets.exact(sets_of(predicted), sets_of(true))
    assert 0.3 < expected < 0.9
    expect(value(ExactMetric(), labels), expected)
    expect(value(ExactMetric(), (predicted[:, 1], true[:, 1])), (predicted[:, 1] == true[:, 1]).double().mean().item())


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_f1_over_labels(labels: tuple[Tensor, Tensor], average: str) -> None:
    """The fourth label neither occurs nor is predicted."""
    slow = sets.f1_micro if average == "micro" else sets.f1_macro
    expect(value(LabelF1Metric(C, average), labels), slow(sets_of(labels[0]), sets_of(labels[1]), range(C)))


def test_questions_whose_answers_are_all_right(answers: tuple[Tensor, Tensor]) -> None:
    predicted, truths = answers
    expected = sets.questions_right(predicted.tolist(), truths[:, 0].tolist(), truths[:, 1].tolist())
    assert 0.2 < expected < 0.9
    expect(value(GroupMetric(), answers), expected)
    (f1,) = build_metrics(["f1"], 2).values()
    assert isinstance(f1, ConfusionMetric)
    found = value(AnswerMetric(f1.function, 2), answers)
    expect(found, sets.f1_micro(sets_of(predicted[:, None]), sets_of(truths[:, :1]), [0]))


def test_questions_that_differ_in_the_last_bit_of_a_large_number() -> None:
    large = (1 << 62) + torch.tensor([0, 1, 2])
    expect(value(GroupMetric(), (torch.tensor([0, 1, 1]), torch.stack([torch.ones(3).long(), large], 1))), 2 / 3)


@pytest.mark.parametrize("name", ["exact", "micro", "macro", "groups"])
def test_parts_and_empty_updates_change_nothing(
    name: str, labels: tuple[Tensor, Tensor], answers: tuple[Tensor, Tensor]
) -> None:
    predicted, true = answers if name == "groups" else labels
    cuts = [slice(0, 0), slice(0, 30), slice(30, 31), slice(31, None), slice(0, 0)]
    together, apart = metric(name), metric(name)
    assert_close(value(apart, *((predicted[c], true[c]) for c in cuts)), value(together, (predicted, true)))
    assert together.compute() > 0


@pytest.mark.parametrize("name", ["exact", "micro", "macro", "groups"])
def test_nothing_seen_is_0(name: str) -> None:
    found = metric(name)
    found._update_count = 1  # torchmetrics warns of a metric that was never updated
    assert_close(found.compute(), torch.tensor(0.0))


@pytest.mark.parametrize("shares", [(40, 17), (57, 0), (0, 57)])
def test_uneven_ranks(shares: tuple[int, int], answers: tuple[Tensor, Tensor]) -> None:
    """A question's answers lie on both ranks, or one rank has none."""
    ranks = [GroupMetric() for _ in shares]
    start = 0
    for rank, share in zip(ranks, shares, strict=True):
        if share:
            rank.update(*(part[start : start + share] for part in answers))
        start += share
    states = iter([[torch.cat([torch.empty(0).long(), *rank.metric_state[name]]) for rank in ranks] for name in STATES])

    def gather(mine: Tensor, group: Any = None) -> list[Tensor]:
        found = next(states)
        assert mine.dtype == torch.long and torch.equal(mine, found[0])
        return found

    ranks[0].dist_sync_fn, ranks[0].distributed_available_fn = gather, lambda: True
    ranks[0]._update_count = 1
    assert_close(ranks[0].compute(), value(GroupMetric(), answers))


STATES = ("groups", "right")


def metric(name: str) -> Metric:
    if name in ("micro", "macro"):
        return LabelF1Metric(C, name)
    return ExactMetric() if name == "exact" else GroupMetric()
