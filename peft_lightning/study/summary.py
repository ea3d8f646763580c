"""The table of a study: of every method the variant that its dev shots chose, beside the majority class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peft_lightning.study.selection import choose
from peft_lightning.study.statistics import mean_interval

__all__ = ["below_majority", "summary"]

_SEEDS = 3  # an interval of fewer says nothing


def summary(
    records: Sequence[Mapping[str, Any]], majorities: Mapping[str, Mapping[str, float]]
) -> list[dict[str, str]]:
    """Return a row for every task, number of shots and method; cells that failed are counted only.

    Each run's variant is the best on its own dev shots; the column names the one that was chosen most often. Fewer than
    three seeds have no interval.

    Args:
        records: of all cells.
        majorities: task -> metrics of its majority class.
    """
    failed = Counter(_row(record) for record in records if "error" in record)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {_row(record): [] for record in records}
    for record in choose(records):
        groups[_row(record)].append(record)
    return [
        {
            "task": str(key[0]),
            "shots": str(key[1]),
            "method": str(key[2]),
            **_scores(chosen, majorities.get(key[0], {})),
            "failed cells": str(failed[key] or ""),
        }
        for key, chosen in groups.items()
    ]


def below_majority(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a line on the methods whose mean is below the majority class, or nothing where none is.

    Args:
        rows: of :func:`summary`.
    """
    low = [
        f"{row['method']} on {row['task']}, {row['shots']} shots"
        for row in rows
        if row["test mean"]
        and row["majority class"] != "n/a"
        and float(row["test mean"].split()[0]) < float(row["majority class"])
    ]
    return f"below the majority class: {'; '.join(low)}" if low else ""


def _row(record: Mapping[str, Any]) -> tuple[Any, ...]:
    cell = record["cell"]
    return cell["task"], cell["shots"], cell["method"]


def _scores(chosen: Sequence[Mapping[str, Any]], majority: Mapping[str, float]) -> dict[str, str]:
    names = ("metric", "test mean", "seeds", "majority class", "chosen on dev", "trained")
    if not chosen:
        return dict.fromkeys(names, "")
    metric = chosen[0]["metric"]
    interval = mean_interval([100 * record["test"][metric] for record in chosen])
    variants = Counter(_variant(record["cell"]) for record in chosen)
    share = f"{100 * majority[metric]:.1f}" if metric in majority else "n/a"
    trained = f"{chosen[0]['trained_parameters']:,}"
    mean = interval.format(1) if interval.count >= _SEEDS else f"{interval.mean:.1f}"
    values = (metric, mean, str(interval.count), share, variants.most_common(1)[0][0], trained)
    return dict(zip(names, values, strict=True))


def _variant(cell: Mapping[str, Any]) -> str:
    parts = [cell["variant"]] if cell["variant"] != "default" else []
    parts += [f"lr {cell['lr']:g}"] if cell["lr"] is not None else []
    length = f"{cell['steps']} steps" if "steps" in cell else f"{cell['epochs']} epochs"
    return ", ".join([*parts, length])
