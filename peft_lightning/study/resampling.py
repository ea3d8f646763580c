"""What few data splits and few test examples say: a two-level paired bootstrap, and Holm's correction.

An accuracy here depends on two draws: of the split (which shots, which initial values) and of the test examples. Both
are drawn again, with replacement: S splits, then I examples. Where all splits are tested on the same examples, one draw
of examples serves all the splits that were drawn (Owen, 2007, "The pigeonhole bootstrap", Annals of Applied Statistics
1:386); where each split has its own, every drawn split draws its own. A difference of two methods is taken inside each
replicate: both see the same splits and the same examples. With s_1 .. s_S and i_1 .. i_I drawn,

    theta* = 1/S sum_k m(x[s_k, i_1 .. i_I]),       m = the mean, or any metric of predictions and truths.

The interval is theta -+ t(S - 1) se, with se^2 = S / (S - 1) var(theta*): the bootstrap takes S splits for all there
are, and its variance is too small by (S - 1) / S; the quantile of Student's t allows for how little S values say of
their spread (Hesterberg, 2015, "What teachers should know about the bootstrap", The American Statistician 69:371).
``percentile`` gives the plain percentiles instead, which with ten splits cover less than they say, and with four much
less. The p-value is that of the same test: of t = theta / se, or the smaller tail share of the replicates, doubled.

With the same examples for all splits, what neither split nor example explains counts three times (Owen, theorem 2), so
that the interval is rather too wide than too narrow. With one split, examples alone are drawn, and the interval says
nothing of other splits; with one example, splits alone.

Letters of shapes: S splits, I examples, B replicates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_lightning.errors import UsageError

__all__ = ["Estimate", "bootstrap", "f1", "holm", "pearson"]

_Array = np.ndarray[Any, Any]
Metric = Callable[[_Array, _Array], _Array]
_INTERVALS = ("t", "percentile")
_CELLS = 4_000_000  # numbers in memory at once


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over splits, or a mean difference, and what resampling says of it.

    Attributes:
        value: of all splits and examples.
        low: lower end of the interval.
        high: upper end.
        p: two-sided, for the value 0; of use for a difference.
        splits: how many.
        examples: of each split.
    """

    value: float
    low: float
    high: float
    p: float
    splits: int
    examples: int

    def format(self, digits: int = 1, scale: float = 100.0) -> str:
        """Return the value and its interval, in hundredths unless told otherwise.

        >>> Estimate(value=0.5, low=0.4, high=0.61, p=0.01, splits=3, examples=9).format()
        '50.0 [40.0, 61.0]'
        """
        value, low, high = (f"{number * scale:.{digits}f}" for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def bootstrap(
    first: Any,
    second: Any = None,
    *,
    truths: Any = None,
    metric: Metric | None = None,
    same_examples: bool = True,
    interval: str = "t",
    replicates: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the mean over splits of a method, or how much it is above another one, with interval and p-value.

    Args:
        first: numbers ``[S, I]``: whether each example was answered right, or any score of it; with a ``metric`` the
            predictions.
        second: the same of the other method, on the same splits and examples; None: ``first`` alone.
        truths: with a ``metric``, ``[I]``, or ``[S, I]`` where each split has its own examples.
        metric: of predictions and truths along their last axis, for what is no mean over examples, such as
            :func:`pearson`; None: the mean.
        same_examples: whether column i is the same example in all splits.
        interval: t or percentile.
        replicates: B.
        level: that the interval should cover.
        seed: of the draws; equal seeds give equal draws for arrays of one shape.

    Raises:
        UsageError: if shapes or settings do not fit together.

    >>> right = [[1, 0, 1, 1], [1, 1, 1, 0]]
    >>> bootstrap(right, right).p
    1.0
    """
    _check_settings(interval, replicates, level)
    methods = [_matrix("first", first)] + ([] if second is None else [_matrix("second", second)])
    if len({method.shape for method in methods}) > 1:
        shapes = [method.shape for method in methods]
        raise UsageError(f"first and second have the shapes {shapes[0]} and {shapes[1]}: pairs need equal ones")
    splits, examples = methods[0].shape
    statistic = _Statistic(methods, _truths(truths, metric, (splits, examples), same_examples), metric)
    rng = np.random.default_rng(seed)
    if same_examples:
        found = statistic.crossed(rng, replicates)
    else:
        found = statistic.nested(rng, replicates)
    value = statistic.value()
    low, high, p = _percentiles(found, level) if interval == "percentile" else _student(found, value, statistic, level)
    return Estimate(value=value, low=low, high=high, p=p, splits=splits, examples=examples)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for how many there are.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6:65. In
    ascending order p_(1) .. p_(m): p~_(k) = max over j <= k of min(1, (m - j + 1) p_(j)). To reject where p~ <= alpha
    keeps the chance of any false rejection in the family at alpha, however the tests depend on one another.

    Raises:
        UsageError: if one is no probability.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise UsageError(f"p_values[{name!r}] is {p}: it must be from 0 to 1")
    corrected, least = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}


def pearson(predictions: _Array, truths: _Array) -> _Array:
    """Return the correlation along the last axis; 0 where one of the two is constant."""
    left, right = (values - values.mean(-1, keepdims=True) for values in (predictions, truths))
    sizes = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    # what rounding leaves of a constant is no variation
    least = 1e-12 * (1 + np.abs(predictions).max(-1) * np.abs(truths).max(-1)) * predictions.shape[-1]
    flat = sizes <= least
    return np.where(flat, 0.0, (left * right).sum(-1) / np.where(flat, 1.0, sizes))


def f1(predictions: _Array, truths: _Array) -> _Array:
    """Return F1 of the class 1 along the last axis; 0 where there is none of it."""
    said, is_so = predictions == 1, truths == 1
    both, either = (said & is_so).sum(-1), said.sum(-1) + is_so.sum(-1)
    return np.asarray(2 * both / np.maximum(either, 1), dtype=float)


class _Statistic:
    """theta of drawn splits and examples; a difference is linear in the methods' values, not in their metric."""

    def __init__(self, methods: list[_Array], truths: _Array | None, metric: Metric | None) -> None:
        self.truths, self.metric = truths, metric
        # means of differences are differences of means
        self.methods = methods if metric is not None or len(methods) == 1 else [methods[0] - methods[1]]
        self.splits, self.examples = methods[0].shape

    def value(self) -> float:
        """Theta of what there is."""
        return float(self._scores(self.methods, self.truths).mean())

    def crossed(self, rng: np.random.Generator, replicates: int) -> _Array:
        """``[B]``: one draw of examples for all splits of a replicate."""
        found = []
        for count in _chunks(replicates, self.examples * (1 if self.metric is None else self.splits)):
            weights_BS = self._counts(rng, count, self.splits) / self.splits
            if self.metric is None:
                weights_BI = self._counts(rng, count, self.examples) / self.examples
                found.append(((weights_BS @ self.methods[0]) * weights_BI).sum(-1))
                continue
            drawn_BI = self._draw(rng, count, self.examples)
            methods = [method[:, drawn_BI] for method in self.methods]
            truths = None if self.truths is None else self.truths[..., drawn_BI]
            found.append((self._scores(methods, truths) * weights_BS.T).sum(0))
        return np.concatenate(found)

    def nested(self, rng: np.random.Generator, replicates: int) -> _Array:
        """``[B]``: a draw of examples for every drawn split."""
        found = []
        for count in _chunks(replicates, self.examples * self.splits):
            splits_BS1 = self._draw(rng, count, self.splits)[..., None]
            drawn_BSI = rng.integers(self.examples, size=(count, self.splits, self.examples))
            methods = [method[splits_BS1, drawn_BSI] for method in self.methods]
            truths = None
            if self.truths is not None:
                truths = np.broadcast_to(self.truths, self.methods[0].shape)[splits_BS1, drawn_BSI]
            found.append(self._scores(methods, truths).mean(-1))
        return np.concatenate(found)

    def _scores(self, methods: list[_Array], truths: _Array | None) -> _Array:
        """The metric of the first method, less that of the second, along the last axis."""
        if self.metric is None or truths is None:
            return methods[0].mean(-1)
        scores = [np.asarray(self.metric(method, truths)) for method in methods]
        return scores[0] if len(scores) == 1 else scores[0] - scores[1]

    @staticmethod
    def _draw(rng: np.random.Generator, count: int, size: int) -> _Array:
        """``[B, size]`` numbers below ``size``; a lone one is always drawn, and so drawing it adds no chance."""
        return rng.integers(size, size=(count, size))

    @classmethod
    def _counts(cls, rng: np.random.Generator, count: int, size: int) -> _Array:
        """``[B, size]``: how often each number is drawn."""
        drawn = cls._draw(rng, count, size) + size * np.arange(count)[:, None]
        return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)


def _student(found: _Array, value: float, statistic: _Statistic, level: float) -> tuple[float, float, float]:
    from scipy.stats import t

    size = statistic.splits if statistic.splits > 1 else statistic.examples
    error = float(found.std())
    if size == 1 or error < 1e-12:
        # one number, or all alike: nothing to learn about spread from them
        wide = math.nan if size == 1 else 0.0
        return value - wide, value + wide, 1.0 if size == 1 or abs(value) < 1e-12 else 0.0
    error *= math.sqrt(size / (size - 1))
    width = float(t.ppf(0.5 + level / 2, size - 1)) * error
    return value - width, value + width, float(2 * t.sf(abs(value) / error, size - 1))


def _percentiles(found: _Array, level: float) -> tuple[float, float, float]:
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    # differences of means are sums of fractions: a zero may come out a little beside it
    below, above = (found <= 1e-12).sum(), (found >= -1e-12).sum()
    return float(low), float(high), float(min(1.0, 2 * (min(below, above) + 1) / (len(found) + 1)))


def _chunks(replicates: int, cells: int) -> list[int]:
    """How many replicates at a time."""
    most = max(1, _CELLS // cells)
    return [min(most, replicates - start) for start in range(0, replicates, most)]


def _matrix(name: str, values: Any) -> _Array:
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise UsageError(f"{name} has the shape {matrix.shape}: it must be finite numbers [splits, examples]")
    return matrix


def _truths(truths: Any, metric: Metric | None, shape: tuple[int, int], same_examples: bool) -> _Array | None:
    if (truths is None) != (metric is None):
        raise UsageError("truths and metric go together: a metric needs truths, and a mean has no use for them")
    if truths is None:
        return None
    found, allowed = np.asarray(truths), [shape[1:]] if same_examples else [shape[1:], shape]
    if found.shape not in allowed:
        raise UsageError(f"truths has the shape {found.shape}: it must be {' or '.join(map(str, allowed))}")
    return found


def _check_settings(interval: str, replicates: int, level: float) -> None:
    if interval not in _INTERVALS:
        raise UsageError(f"interval is {interval!r}: it must be {' or '.join(_INTERVALS)}")
    if replicates < 100:
        raise UsageError(f"replicates is {replicates}: it must be at least 100")
    if not 0 < level < 1:
        raise UsageError(f"level is {level}: it must lie between 0 and 1, both excluded")
