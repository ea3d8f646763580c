"""Whether a measured importance is signal or noise, and whether it is the task's or the backbone's.

The paper (Prune-LoRA, figure 1) shows importances of different tasks side by side. What they show can come by chance:
a random classifier and a small sample decide it too. So the same is measured from several seeds, each with another
start of the classifier and other training rows (where there are more than are looked at), and compared by Spearman's
rank correlation over all heads' final importance (functional/heads), since ranks are what pruning follows:

* between two seeds of a task: near 1 the order of the heads is measured, near 0 it is drawn;
* between two tasks: of the means over seeds, and of single seeds, two different ones. Only the latter compares with the
  correlation between seeds of one task: where it is no lower, the heads' order is the backbone's and not the task's.

What is written and pruned by is the mean over seeds of equation 1, before it is normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.heads import normalise, rank_correlation
from peft_lightning.layers.importance import Importance
from peft_lightning.layers.planning import block_scores
from peft_lightning.layers.prune_config import ImportanceConfig
from peft_lightning.layers.pruned_heads import AttentionSite

__all__ = ["importance_report", "mean_importance", "verdicts"]

# Mean rank correlations between seeds from which we speak of signal, and below which of noise.
_SIGNAL, _NOISE = 0.7, 0.3
# Tasks must be less alike than seeds of one task by so much to be called different.
_MARGIN = 0.05


def mean_importance(measured: Sequence[Importance]) -> Importance:
    """The mean of several measurements on one backbone; their examples and tokens are summed.

    Args:
        measured: at least one, all of the same units.

    Raises:
        UsageError: if there is none, or their units differ.
    """
    if not measured:
        raise UsageError("measured is empty: a mean needs at least one importance")
    units = [
        {kind: {path: len(part) for path, part in getattr(one, kind).items()} for kind in ("heads", "neurons")}
        | {"blocks": dict.fromkeys(one.blocks, 1)}
        for one in measured
    ]
    if any(other != units[0] for other in units):
        raise UsageError("measured: the importances are of different heads, neurons or blocks")

    def mean(kind: str) -> dict[str, Tensor]:
        paths = getattr(measured[0], kind)
        return {path: torch.stack([getattr(one, kind)[path] for one in measured]).mean(0) for path in paths}

    return Importance(
        heads=mean("heads"),
        neurons=mean("neurons"),
        blocks={path: sum(one.blocks[path] for one in measured) / len(measured) for path in measured[0].blocks},
        examples=sum(one.examples for one in measured),
        tokens=sum(one.tokens for one in measured),
    )


def importance_report(
    measured: Mapping[str, Mapping[int, Importance]], sites: Mapping[str, AttentionSite], settings: ImportanceConfig
) -> dict[str, Any]:
    """What was measured, and how far it can be believed; plain values.

    Args:
        measured: task -> seed -> importance, all of one backbone.
        sites: the backbone's attentions.
        settings: how importance is normalised, and what a block's is.

    Returns:
        ``tasks``: for each the examples and tokens, the final importance of its ``heads`` by attention, ``blocks`` by
        layer, a ``table`` of all heads, the least important first, the heads ``by_seed``, and ``between_seeds``: all
        pairs, their mean and the least (None for one seed). ``between_tasks``: for each pair the ``correlation`` of the
        means and that of ``single_seeds`` (None for one seed).

    Raises:
        UsageError: if units differ, or blocks' own gates are asked for and were not measured.
        DegenerateScoreError: if an importance ranks nothing.
    """
    tasks, orders = {}, {}
    for task, by_seed in measured.items():
        mean = mean_importance(list(by_seed.values()))
        heads = normalise(mean.heads, settings.norm)
        seeds = {seed: normalise(one.heads, settings.norm) for seed, one in by_seed.items()}
        orders[task] = {seed: torch.cat(list(final.values())) for seed, final in seeds.items()}
        tasks[task] = {
            "examples": mean.examples,
            "tokens": mean.tokens,
            "heads": _plain(heads),
            "blocks": block_scores(mean, sites, settings),
            "table": _table(mean.heads, heads),
            "by_seed": {str(seed): _plain(final) for seed, final in seeds.items()},
            "between_seeds": _between_seeds(orders[task]),
        }
    return {"tasks": tasks, "between_tasks": _between_tasks(tasks, orders)}


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """Lines that say plainly whether the importance is signal, and whether it is the task's.

    Args:
        report: of :func:`importance_report`.
    """
    lines, alike = [], {}
    for name, task in report["tasks"].items():
        between = task["between_seeds"]
        if between is None:
            lines.append(f"{name}: rank correlation between seeds not measured: one seed")
            continue
        mean = alike[name] = between["mean"]
        word = "signal" if mean >= _SIGNAL else "mostly noise" if mean < _NOISE else "signal and noise"
        count = len(between["pairs"])
        pairs = f"lowest of {count} pairs {between['least']:.2f}" if count > 1 else "one pair"
        lines.append(f"{name}: rank correlation between seeds {mean:.2f} ({pairs}): {word}")
    for pair in report["between_tasks"]:
        one, other = pair["tasks"]
        line = f"{one} and {other}: rank correlation between tasks {pair['correlation']:.2f}"
        if pair["single_seeds"] is not None:
            seeds = min(alike[one], alike[other])
            if seeds < _NOISE:
                word = "the seeds do not agree, so nothing is known"
            elif pair["single_seeds"] < seeds - _MARGIN:
                word = "the tasks differ"
            else:
                word = "no less than between seeds, so the order is the backbone's"
            line += f", of single seeds {pair['single_seeds']:.2f}: {word}"
        lines.append(line)
    return lines


def _plain(heads: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {path: tensor.tolist() for path, tensor in heads.items()}


def _table(raw: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """All heads, the least important first."""
    rows = [
        {"attention": path, "head": head, "importance": value, "measured": float(raw[path][head])}
        for path, tensor in final.items()
        for head, value in enumerate(tensor.tolist())
    ]
    return sorted(rows, key=lambda row: float(row["importance"]))


def _between_seeds(orders: Mapping[int, Tensor]) -> dict[str, Any] | None:
    pairs: list[dict[str, Any]] = [
        {"seeds": [one, other], "correlation": rank_correlation(orders[one], orders[other])}
        for one, other in combinations(orders, 2)
    ]
    if not pairs:
        return None
    values = [pair["correlation"] for pair in pairs]
    return {"mean": sum(values) / len(values), "least": min(values), "pairs": pairs}


def _between_tasks(tasks: Mapping[str, Any], orders: Mapping[str, Mapping[int, Tensor]]) -> list[dict[str, Any]]:
    means = {
        task: torch.tensor([value for heads in entry["heads"].values() for value in heads], dtype=torch.float64)
        for task, entry in tasks.items()
    }
    rows = []
    for one, other in combinations(tasks, 2):
        singles = [
            rank_correlation(orders[one][a], orders[other][b])
            for a, b in product(orders[one], orders[other])
            if a != b  # the same seed starts the classifiers alike, and would count for the tasks
        ]
        rows.append(
            {
                "tasks": [one, other],
                "correlation": rank_correlation(means[one], means[other]),
                "single_seeds": sum(singles) / len(singles) if singles else None,
            }
        )
    return rows
