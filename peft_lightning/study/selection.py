"""Which of a cell's variants counts: the best on the dev shots. The rows that are reported on are never looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft_lightning.errors import UsageError
from peft_lightning.study.outcome import better

__all__ = ["choose"]

_RUN = ("method", "task", "shots", "seed")
_VARIED = ("variant", "lr", "epochs", "steps")


def choose(cells: Sequence[Mapping[str, Any]], per: Sequence[str] = _RUN) -> list[Mapping[str, Any]]:
    """Return the cells of the variant that is best in each group.

    A variant is what differs in ``variant``, ``lr``, ``epochs`` or ``steps``. The best one has the highest mean of the
    task's first metric on the dev shots; of equal ones, that with the lower mean loss there, then the first. One that
    lacks cells which others of its group have (those that failed) is chosen only if all do.

    Args:
        cells: records of a study; those with an ``error`` are passed over.
        per: what makes a group: a choice for each run, or, as with ``("method", "task")``, one for several.

    Raises:
        UsageError: ``per`` names what is varied, or nothing that a cell has.

    >>> cells = [
    ...     {"cell": {"method": "a", "variant": "x", "lr": lr, "epochs": 1}, "metric": "f1", "dev": dev}
    ...     for lr, dev in ((0.1, {"f1": 0.5, "loss": 1.0}), (0.2, {"f1": 0.7, "loss": 1.0}))
    ... ]
    >>> [cell["cell"]["lr"] for cell in choose(cells, per=["method"])]
    [0.2]
    """
    if odd := [name for name in per if name not in _RUN]:
        raise UsageError(f"per has {odd[0]!r}; allowed: {', '.join(_RUN)}")
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Mapping[str, Any]]]] = {}
    for cell in cells:
        if "error" not in cell:
            names = cell["cell"]
            variants = groups.setdefault(tuple(names[name] for name in per), {})
            variants.setdefault(tuple(names.get(name) for name in _VARIED), []).append(cell)
    return [cell for variants in groups.values() for cell in _best(list(variants.values()))]


def _best(variants: Sequence[Sequence[Mapping[str, Any]]]) -> Sequence[Mapping[str, Any]]:
    most = max(map(len, variants))
    whole = [cells for cells in variants if len(cells) == most]
    best = whole[0]
    for cells in whole[1:]:
        if better(_mean(cells), _mean(best), "score"):
            best = cells
    return best


def _mean(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the dev shots of all cells."""
    pairs = [(cell["dev"][cell["metric"]], cell["dev"]["loss"]) for cell in cells]
    score, loss = (math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {"score": score, "loss": loss}
