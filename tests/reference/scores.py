"""Slow oracles of the metrics, by counting and comparing one example at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt


def f1(predictions: Sequence[int], labels: Sequence[int], positive: int) -> float:
    """F1 of the class ``positive``; 0 where it is undefined."""
    pairs = list(zip(predictions, labels, strict=True))
    hits = sum(p == positive and t == positive for p, t in pairs)
    misses = sum((p == positive) != (t == positive) for p, t in pairs)
    return 2 * hits / (2 * hits + misses) if hits + misses else 0.0


def macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Mean F1 of the classes that occur or are predicted; 0 where there are none."""
    classes = set(predictions) | set(labels)
    return sum(f1(predictions, labels, c) for c in classes) / len(classes) if classes else 0.0


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of hits; 0 for no example."""
    hits = [p == t for p, t in zip(predictions, labels, strict=True)]
    return sum(hits) / len(hits) if hits else 0.0


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation; 0 where one side is constant."""
    n = len(x)
    if not n:
        return 0.0
    xm, ym = sum(x) / n, sum(y) / n
    cov = sum((a - xm) * (b - ym) for a, b in zip(x, y, strict=True))
    var = sum((a - xm) ** 2 for a in x) * sum((b - ym) ** 2 for b in y)
    return cov / sqrt(var) if var else 0.0


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks."""
    ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in (x, y)]
    return pearson(ranks[0], ranks[1])


def mcc(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation by its definition: of the one-hot codes, summed over classes."""
    n, classes = len(labels), sorted(set(predictions) | set(labels))

    def covariance(a: Sequence[int], b: Sequence[int]) -> float:
        total = 0.0
        for c in classes:
            am, bm = sum(v == c for v in a) / n, sum(v == c for v in b) / n
            total += sum(((p == c) - am) * ((q == c) - bm) for p, q in zip(a, b, strict=True))
        return total

    scale = sqrt(covariance(predictions, predictions) * covariance(labels, labels)) if n else 0.0
    return covariance(predictions, labels) / scale if scale > 1e-12 else 0.0
