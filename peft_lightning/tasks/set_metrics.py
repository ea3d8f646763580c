"""Metrics of answers that are more than one class: exact matches, F1 over labels, questions with several answers.

As in ``tasks/metrics.py``, states are sums or gathered lists, so that ranks with different numbers of rows give the
value of one process; an update may be empty, and a value is 0 where it is undefined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from peft_lightning.tasks.metrics import ConfusionMetric, MeanScore

__all__ = ["AnswerMetric", "ExactMetric", "GroupMetric", "LabelF1Metric"]


class ExactMetric(MeanScore):
    """The share of rows that are predicted wholly right."""

    def update(self, predictions: Tensor, truths: Tensor) -> None:
        """Compare ``predictions`` with ``truths``, both [B] or both [B, K]."""
        right = predictions == truths
        right_B = right.all(1) if right.dim() > 1 else right
        self.total += right_B.sum()
        self.count += len(right_B)


class LabelF1Metric(Metric):
    """F1 over rows that each have any number of ``num_labels`` labels.

    Args:
        num_labels: number C.
        average: ``micro`` counts all labels of all rows together; ``macro`` is the mean of each label's F1, without
            labels that neither occur nor are predicted.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, num_labels: int, average: str) -> None:
        super().__init__()
        self.average = average
        self.add_state("counts", torch.zeros(2, num_labels, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, truths: Tensor) -> None:
        """Count ``predictions`` and ``truths``, both [B, C] of 0 and 1."""
        self.counts += torch.stack([(predictions * truths).sum(0), (predictions + truths).sum(0)])

    def compute(self) -> Tensor:
        """Return a scalar in float32."""
        both_C, either_C = self.counts.cpu().double()
        value = 2 * both_C.sum() / either_C.sum() if self.average == "micro" else (2 * both_C / either_C).nanmean()
        return value.nan_to_num(0.0).float().to(self.device)


class AnswerMetric(ConfusionMetric):
    """A function of the confusion matrix of all answers, whichever question they belong to."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count ``predictions`` [B] against the first column of ``labels`` [B, 2], which are label and question."""
        super().update(predictions, labels[:, 0])


class GroupMetric(Metric):
    """The share of questions whose answers are all right, wherever these were read."""

    full_state_update = False
    higher_is_better = True
    groups: list[Tensor] | Tensor
    right: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("groups", [], dist_reduce_fx="cat")
        self.add_state("right", [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, truths: Tensor) -> None:
        """Keep which of ``predictions`` [B] are right; ``truths`` int64 [B, 2] are label and question."""
        assert isinstance(self.groups, list) and isinstance(self.right, list)
        self.groups.append(truths[:, 1])
        self.right.append((predictions == truths[:, 0]).long())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks."""
        # Where a rank has seen nothing, torchmetrics 1.9 would send floats to ranks that wait for whole numbers.
        for state in (self.groups, self.right):
            if isinstance(state, list) and not state:
                state.append(torch.empty(0, dtype=torch.long, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Return a scalar in float32."""
        none = torch.empty(0, dtype=torch.long, device=self.device)
        # After a gather the state is one tensor, before it a list.
        groups, right = (
            (state if isinstance(state, Tensor) else torch.cat([none, *state])).cpu()
            for state in (self.groups, self.right)
        )
        found, group = groups.unique(return_inverse=True)
        wrong = torch.zeros(len(found), dtype=torch.long).index_add(0, group, 1 - right)
        return (wrong == 0).double().mean().nan_to_num(0.0).float().to(self.device)
