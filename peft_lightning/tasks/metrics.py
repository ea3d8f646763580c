"""The metrics that GLUE and SuperGLUE name, exact over ranks that hold different numbers of examples.

Two states serve all six: a confusion matrix, which ranks add up, and the pairs of numbers themselves, which
they gather. An update may be empty, as on a rank whose last batch is only padding. The ready classes of
torchmetrics 1.9 are not used: they refuse an empty update, and their Matthews correlation of a constant
predictor is not 0 on a small sample (0.58 for four examples of which one is negative).

Notation: ``c[t, p]`` counts the examples of class t that were predicted as p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from peft_lightning.errors import UsageError


class MeanScore(Metric):
    """Mean of the scores that a subclass adds up; 0 where there are none.

    The sum is kept in whole multiples of 1 / ``unit``, so that it does not depend on the order of the rows or on which
    rank adds which.
    """

    full_state_update = False
    higher_is_better = True
    unit = 1
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return a scalar in float32."""
        # MPS has no float64.
        mean = self.total.cpu().double() / self.unit / self.count.cpu()
        return mean.nan_to_num(0.0).float().to(self.device)


class ConfusionMetric(Metric):
    """A function of the confusion matrix of ``num_labels`` classes; 0 where it is undefined."""

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, function: Callable[[Tensor], Tensor], num_labels: int) -> None:
        super().__init__()
        self.function, self.num_labels = function, num_labels
        zeros = torch.zeros(num_labels, num_labels, dtype=torch.long)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count ``predictions`` against ``labels``, both [B] of integers."""
        cells = labels * self.num_labels + predictions
        self.confusion += torch.bincount(cells, minlength=self.num_labels**2).view_as(self.confusion)

    def compute(self) -> Tensor:
        """Return a scalar in float32."""
        # MPS has no float64, and counts of a large split do not fit float32.
        return self.function(self.confusion.cpu().double()).nan_to_num(0.0).float().to(self.device)


class CorrelationMetric(Metric):
    """A function of all predicted and all true numbers; 0 where it is undefined."""

    full_state_update = False
    higher_is_better = True
    predictions: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.add_state("predictions", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Keep ``predictions`` and ``labels``, both [B]."""
        assert isinstance(self.predictions, list) and isinstance(self.labels, list)
        self.predictions.append(predictions.float())
        self.labels.append(labels.float())

    def compute(self) -> Tensor:
        """Return a scalar in float32."""
        # After a gather the state is one tensor, before it a list.
        predictions, labels = (
            state if isinstance(state, Tensor) else torch.cat([torch.empty(0, device=self.device), *state])
            for state in (self.predictions, self.labels)
        )
        value = self.function(predictions.cpu().double(), labels.cpu().double())
        return value.nan_to_num(0.0).float().to(self.device)


def _accuracy(c: Tensor) -> Tensor:
    return c.trace() / c.sum()


def _f1_per_class(c: Tensor) -> Tensor:
    return 2 * c.diag() / (c.sum(0) + c.sum(1))


def _f1(c: Tensor) -> Tensor:
    return _f1_per_class(c)[1]


def _macro_f1(c: Tensor) -> Tensor:
    # A class that neither occurs nor is predicted has no F1 and is left out, as in scikit-learn.
    return _f1_per_class(c).nanmean()


def _mcc(c: Tensor) -> Tensor:
    n, true, predicted = c.sum(), c.sum(1), c.sum(0)
    covariance = c.trace() * n - true @ predicted
    return covariance / ((n**2 - predicted @ predicted) * (n**2 - true @ true)).sqrt()


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(), y - y.mean()
    return x @ y / ((x @ x) * (y @ y)).sqrt()


def _ranks(x: Tensor) -> Tensor:
    _, group, size = x.unique(return_inverse=True, return_counts=True)
    return (size.cumsum(0) - (size - 1) / 2)[group]


def _spearman(x: Tensor, y: Tensor) -> Tensor:
    return _pearson(_ranks(x), _ranks(y))


_CLASSES = {"accuracy": _accuracy, "f1": _f1, "macro_f1": _macro_f1, "mcc": _mcc}
_NUMBERS = {"pearson": _pearson, "spearman": _spearman}


def build_metrics(names: Sequence[str], num_labels: int) -> MetricCollection:
    """Return the metrics ``names`` for ``num_labels`` classes, or for a regression if ``num_labels`` is 1.

    ``update`` takes predictions and labels, [B] each: classes as integers, or numbers. ``f1`` is that of
    class 1.

    Raises:
        UsageError: a name is unknown, or is no metric of such a task.
    """
    if num_labels == 1:
        numbers = {name: CorrelationMetric(function) for name, function in _NUMBERS.items()}
        return collect(names, numbers, "a regression")
    classes = {name: ConfusionMetric(function, num_labels) for name, function in _CLASSES.items()}
    if num_labels != 2:
        del classes["f1"]
    return collect(names, classes, f"{num_labels} classes")


def collect(names: Sequence[str], known: Mapping[str, Metric], task: str) -> MetricCollection:
    """Return the metrics ``names`` of those that are ``known`` for a ``task``, as messages call it.

    Raises:
        UsageError: a name is unknown.
    """
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"task.metrics has {unknown[0]!r}; allowed for {task}: {', '.join(known)}")
    # Compute groups merge metrics by comparing states; the update is too cheap for that to pay.
    return MetricCollection({name: known[name] for name in names}, compute_groups=False)
