"""The two-level bootstrap by going through every draw there is, and Holm's procedure as it is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import fmean

Rows = Sequence[Sequence[float]]
Score = Callable[[int, Sequence[int]], float]


def crossed(splits: int, examples: int, score: Score) -> list[float]:
    """Theta of every draw of splits and examples, the same examples for all splits of a draw.

    ``score`` gives the value of a split on a list of examples.
    """
    return [
        fmean(score(split, drawn) for split in chosen)
        for chosen in product(range(splits), repeat=splits)
        for drawn in product(range(examples), repeat=examples)
    ]


def nested(splits: int, examples: int, score: Score) -> list[float]:
    """The same with a draw of examples for every split that was drawn."""
    draws = list(product(range(examples), repeat=examples))
    return [
        fmean(score(split, drawn) for split, drawn in zip(chosen, each, strict=True))
        for chosen in product(range(splits), repeat=splits)
        for each in product(draws, repeat=splits)
    ]


def mean_difference(first: Rows, second: Rows) -> Score:
    """How much the mean of a method is above that of the other, on drawn examples."""

    def score(split: int, drawn: Sequence[int]) -> float:
        return fmean(first[split][i] - second[split][i] for i in drawn)

    return score


def rejected(p_values: Mapping[str, float], alpha: float) -> set[str]:
    """Holm: the least is compared with alpha / m, the next with alpha / (m - 1), until one is not rejected."""
    left, found = dict(p_values), set()
    while left:
        name = min(left, key=lambda key: left[key])
        if left[name] > alpha / len(left):
            break
        found.add(name)
        del left[name]
    return found
