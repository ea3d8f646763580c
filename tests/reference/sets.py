"""Slow metrics of labels in sets and of answers to questions, one row after another, as people would count them."""

from __future__ import annotations

from collections.abc import Sequence


def exact(predicted: Sequence[set[int]], true: Sequence[set[int]]) -> float:
    """Share of rows whose sets are equal."""
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def f1_of(predicted: Sequence[set[int]], true: Sequence[set[int]], labels: Sequence[int]) -> float | None:
    """F1 of finding some labels, or None where there was nothing to find and nothing was found."""
    hits = misses = false = 0
    for p, t in zip(predicted, true, strict=True):
        for label in labels:
            hits += label in p and label in t
            misses += label not in p and label in t
            false += label in p and label not in t
    if not hits + misses + false:
        return None
    precision = hits / (hits + false) if hits + false else 0.0
    recall = hits / (hits + misses) if hits + misses else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def f1_micro(predicted: Sequence[set[int]], true: Sequence[set[int]], labels: Sequence[int]) -> float:
    """F1 over all labels together."""
    return f1_of(predicted, true, labels) or 0.0


def f1_macro(predicted: Sequence[set[int]], true: Sequence[set[int]], labels: Sequence[int]) -> float:
    """Mean F1 of the labels that have one."""
    values = [value for label in labels if (value := f1_of(predicted, true, [label])) is not None]
    return sum(values) / len(values) if values else 0.0


def questions_right(predicted: Sequence[int], true: Sequence[int], questions: Sequence[object]) -> float:
    """Share of questions without a wrong answer."""
    names = set(questions)
    good = 0
    for name in names:
        rows = [row for row, question in enumerate(questions) if question == name]
        good += all(predicted[row] == true[row] for row in rows)
    return good / len(names)
