"""The tables of MerA's benchmark, made from their files of cells and from nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.mera_arms import Arm, Plan
from benchmarks.mera_cells import Results
from peft_lightning.errors import DataError
from peft_lightning.study.resampling import Estimate, bootstrap, holm
from peft_lightning.study.tables import markdown_table

__all__ = ["estimate", "gains_table", "majority", "scores_table", "sources_table"]

_MARGIN = 0.05
_REPLICATES = 4000
_Setting = tuple[str, int]


def majority(results: Results, task: str) -> float:
    """Return the accuracy of the most frequent class of the test rows."""
    truths = results.truths[task]
    return max(Counter(truths).values()) / len(truths)


def estimate(results: Results, arm: Arm, setting: _Setting, baseline: Arm | None = None) -> Estimate | None:
    """Return an arm's accuracy, or how much it is above a baseline's on the splits that both have; None without any.

    Ends of intervals stay where accuracies and their differences can be.
    """
    found = _scores(results, arm, setting)
    if baseline is None:
        return _within(0.0, _bootstrap([*found.values()], None)) if found else None
    others = _scores(results, baseline, setting)
    both = sorted(found.keys() & others.keys())
    pair = [found[seed] for seed in both], [others[seed] for seed in both]
    return _within(-1.0, _bootstrap(*pair)) if both else None


def scores_table(results: Results, plan: Plan, arms: Sequence[Arm]) -> str:
    """Return a row an arm with its accuracy in every setting, the majority class, and what failed.

    Raises:
        DataError: there is no cell.
    """
    found = {arm.name: {s: estimate(results, arm, s) for s in plan.settings} for arm in arms}
    if not any(any(row.values()) for row in found.values()):
        raise DataError("there is no cell to make a table of: run the benchmark first")
    rows = []
    for arm in arms:
        row = found[arm.name]
        values = [entry.value for entry in row.values() if entry]
        if not values:
            continue
        shown: dict[str, str] = {_head(s): "" if entry is None else entry.format() for s, entry in row.items()}
        mean = f"{100 * fmean(values):.1f}" if len(values) == len(plan.settings) else ""
        rows.append({"method": arm.title, **shown, "mean": mean, "trained": _trained(results, arm)})
    known = [s for s in plan.settings if s[0] in results.truths]
    share = {_head(s): f"{100 * majority(results, s[0]):.1f}" for s in known}
    rows.append(dict.fromkeys(rows[0], "") | {"method": "majority class", "trained": "0", **share})
    return f"{markdown_table(rows)}\n\n{_context(results, plan)}{_failed(results, plan, found)}"


def gains_table(results: Results, plan: Plan, arms: Sequence[Arm]) -> str:
    """Return a row an arm with how much it is above the baseline of its mode, paired by split and test row.

    A star marks p below 0.05 after Holm's correction over the settings of the row.
    """
    rows = []
    for arm in arms:
        baseline = plan.baseline_of(arm)
        row = {s: estimate(results, arm, s, baseline) for s in plan.settings}
        if arm.name == baseline.name or not any(row.values()):
            continue
        corrected = holm({_head(s): entry.p for s, entry in row.items() if entry})
        shown = {_head(s): "" if e is None else _signed(e, corrected[_head(s)]) for s, e in row.items()}
        rows.append({"over the baseline": arm.title, **shown})
    if not rows:
        raise DataError("there is no cell to compare with the baseline: run the benchmark first")
    return (
        f"{markdown_table(rows)}\n\nPoints of accuracy over {plan.baseline_of(arms[0]).title}, where tasks are read in "
        "several ways that of the same way, paired by split and test row; * p < 0.05 after Holm's correction over the "
        "row."
    )


def sources_table(results: Results) -> str:
    """Return a row a source: what it was trained on, and what it reaches on its own task beside the trivial answer."""
    rows = []
    for name, facts in results.facts["sources"].items():
        over = facts["score"] - facts["majority"]
        rows.append(
            {
                "source": name,
                "track": facts["track"],
                "rows": f"{facts['rows']:,}",
                "left out": f"{facts['removed']:,}",
                "metric": facts["metric"],
                "score": f"{100 * facts['score']:.1f}",
                "trivial answer": f"{100 * facts['majority']:.1f}",
                "learned": "yes" if over >= _MARGIN else "no",
                "minutes": f"{facts['seconds'] / 60:.1f}",
            }
        )
    return (
        f"{markdown_table(rows)}\n\nLeft out: training rows that share a text with a target. Learned: at least 5 "
        "points above the trivial answer."
    )


def _scores(results: Results, arm: Arm, setting: _Setting) -> dict[int, Any]:
    """Seed -> right or wrong of each test row; of an arm that is chosen, those of the best arm on the dev shots."""
    if not arm.choices:
        return results.scores(arm.name, *setting)
    options = {name: results.scores(name, *setting) for name in arm.choices}
    dev = {
        (cell.arm, cell.seed): (cell.dev.get("accuracy", 0.0), -cell.dev.get("loss", 0.0))
        for cell in results.cells
        if (cell.task, cell.shots) == setting
    }
    seeds = set.intersection(*(set(scores) for scores in options.values()))
    # the first of equals is taken, which is the plain mean
    best = {seed: max(arm.choices, key=lambda name: dev[name, seed]) for seed in sorted(seeds)}
    return {seed: options[name][seed] for seed, name in best.items()}


def _bootstrap(first: Sequence[Any], second: Sequence[Any] | None) -> Estimate:
    run = partial(bootstrap, replicates=_REPLICATES)
    return run(np.stack(first)) if second is None else run(np.stack(first), np.stack(second))


def _within(least: float, found: Estimate) -> Estimate:
    return replace(found, low=max(least, found.low), high=min(1.0, found.high))


def _head(setting: _Setting) -> str:
    return f"{setting[0]}, {setting[1]} shots"


def _signed(entry: Estimate, corrected: float) -> str:
    low, high = (f"{100 * end:+.1f}" for end in (entry.low, entry.high))
    return f"{100 * entry.value:+.1f} [{low}, {high}]{' *' if corrected < 0.05 else ''}"


def _trained(results: Results, arm: Arm) -> str:
    """Trained parameters on the first task that has any."""
    names = {arm.name, *arm.choices}
    return next((f"{cell.trained:,}" for cell in results.cells if cell.arm in names), "")


def _context(results: Results, plan: Plan) -> str:
    device, versions = results.environment["device"], results.environment["versions"]
    sizes = ", ".join(f"{task} {len(truths)}" for task, truths in results.truths.items())
    commit = str(results.environment["commit"])[:12] + (" with changes" if results.environment["dirty"] else "")
    failed = results.facts.get("failed", [])
    return (
        f"Accuracy in hundredths, the mean over {len(plan.seeds)} data splits and its 95 % interval from resampling "
        f"splits and test rows. Test rows: {sizes}, the same for all. Learning rates are chosen on "
        f"{len(plan.held)} other splits{f' (those of table {plan.rates_of})' if plan.rates_of else ''}, the single "
        "source on each split's dev shots. "
        f"{results.facts.get('minutes', 0):.0f} minutes without the sources. "
        f"{f'**{len(failed)} cells failed**, the first: {failed[0]}. ' if failed else ''}"
        f"{device['name']}, {device['threads']} threads in {results.facts.get('workers', 1)} processes; torch "
        f"{versions['torch']}, transformers {versions['transformers']}; commit {commit}."
    )


def _failed(results: Results, plan: Plan, found: dict[str, dict[_Setting, Estimate | None]]) -> str:
    """Say where a dense arm does not beat the majority class clearly."""
    weak, none = [], []
    baselines = {plan.baseline_of(arm).name for arm in plan.arms}
    for setting in plan.settings:
        scores = {name: entry.value for name, row in found.items() if (entry := row[setting])}
        if not scores:
            continue
        needed = majority(results, setting[0]) + _MARGIN
        if max(scores.values()) < needed:
            none.append(_head(setting))
        elif any(scores.get(name, 1.0) < needed for name in baselines):
            weak.append(_head(setting))
    parts = []
    if none:
        parts.append(f"**Failed setup:** no method is 5 points above the majority class: {'; '.join(none)}.")
    if weak:
        parts.append(f"The baseline alone is not 5 points above the majority class: {'; '.join(weak)}.")
    return "".join(f"\n\n{part}" for part in parts)
