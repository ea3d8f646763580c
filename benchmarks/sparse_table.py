"""The tables and figures of the SparseAdapter benchmark, made from its records and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.describe import context, difference, values, warning
from benchmarks.sparse_arms import Arm, Suite
from peft_lightning.analysis.plots import Curve, draw_curves, draw_sweep
from peft_lightning.errors import DataError
from peft_lightning.study.records import RunRecord, read_record
from peft_lightning.study.statistics import mean_interval, paired_interval
from peft_lightning.study.tables import markdown_table

__all__ = ["FIGURES", "read_task", "sparse_table", "tasks_table", "write_figures"]

FIGURES = {
    "sparsity.png": "The metric over the share removed, with the dense adapters as a line (the paper's figure 2)",
    "curves.png": "Loss and metric over the steps, dense and Large-Sparse (the paper's figure 4)",
}

_NAMES = {"accuracy": "accuracy", "f1": "F1", "mcc": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}
_REMARK = (
    "The kept share is that of the prunable weights; Large-Sparse trains as many parameters as the dense adapters, "
    "spread over a wider bottleneck."
)

Records = Mapping[str, Sequence[RunRecord]]


def read_task(suite: Suite, folder: Path, task: str) -> dict[str, list[RunRecord]]:
    """Return a task's records by arm, in the suite's order; arms without any are left out."""
    found = {
        arm.name: [
            read_record(path)
            for seed in suite.seeds
            if (path := folder / f"{suite.stem(task, arm, seed)}.json").is_file()
        ]
        for arm in suite.arms
    }
    return {name: records for name, records in found.items() if records}


def sparse_table(suite: Suite, records: Records) -> str:
    """Return the table of one task, an arm a row, and the line under it. Raises DataError for no record."""
    every = _every([records])
    metrics = _metrics(every[0])
    rows = []
    for arm in suite.arms:
        if found := records.get(arm.name):
            first = _NAMES[metrics[0]]
            over = "" if arm.dense else difference(found, records.get(arm.baseline, []), metrics[0])
            shown = {_NAMES[name]: str(mean_interval(values(found, name))) for name in metrics}
            rows.append(
                {"arm": arm.title, "seeds": str(len(found)), **shown, f"{first} over dense": over, **_size(found)}
            )
    majority = {_NAMES[name]: f"{every[0].results[_majority(name, metrics)]:.3f}" for name in metrics}
    rows.append(dict.fromkeys(rows[0], "") | {"arm": "majority class", "trained parameters": "0", **majority})
    return f"{markdown_table(rows)}\n\n{context(every, _REMARK)}{warning(_dense(suite, {'': records}))}"


def tasks_table(suite: Suite, records: Mapping[str, Records]) -> str:
    """Return the table of several tasks: each task's first metric, and their mean. Raises DataError for no record.

    Args:
        suite: gives arms and titles.
        records: task -> arm -> records.
    """
    every = _every(list(records.values()))
    heads = {task: f"{task} {_NAMES[_metrics(_every([found])[0])[0]]}" for task, found in records.items()}
    rows = []
    for arm in suite.arms:
        by_task = {task: found[arm.name] for task, found in records.items() if arm.name in found}
        if not by_task:
            continue
        cells = {
            head: str(mean_interval(_first(by_task[task]))) if task in by_task else "" for task, head in heads.items()
        }
        one, means = next(iter(by_task.values())), _means(records, arm.name)
        dense = {} if arm.dense else _means(records, arm.baseline)
        both = [seed for seed in means if seed in dense]
        over = paired_interval([means[s] for s in both], [dense[s] for s in both]).format() if both else ""
        mean = str(mean_interval(list(means.values()))) if means else ""
        chosen = {"mean": mean, "mean over its dense arm": over}
        rows.append({"arm": arm.title, "seeds": str(len(one)), **cells, **chosen, **_size(one)})
    majority = {head: f"{_every([records[task]])[0].results['majority']:.3f}" for task, head in heads.items()}
    rows.append(
        dict.fromkeys(rows[0], "") | {"arm": "majority class or constant", "trained parameters": "0", **majority}
    )
    return f"{markdown_table(rows)}\n\n{context(every, _REMARK)}{warning(_dense(suite, records))}"


def write_figures(suite: Suite, folder: Path, records: Records) -> list[Path]:
    """Draw the figures whose arms are on record into ``folder``, and return their paths."""
    arms = {arm.name: arm for arm in suite.arms}
    if "dense" not in records:
        return []
    seeds, first = len(records["dense"]), _metrics(records["dense"][0])[0]
    task, metric, written = records["dense"][0].data["task"], _NAMES[first], []
    swept = [name for name in records if arms[name].prune.score == "snip" and arms[name].prune.sparsity]
    if swept:
        sweep = {"SNIP": _points([(arms[name], records[name]) for name in swept], first)}
        if "random40" in records:
            sweep["at random"] = _points([(arms["random40"], records["random40"])], first)
        level = {"dense": _points([(arms["dense"], records["dense"])], first)}
        title = f"{task}, {seeds} seeds: mean and 95 % t interval"
        written.append(folder / "sparsity.png")
        draw_sweep(sweep, level, written[-1], across="removed, %", up=metric, title=title)
    large = [name for name in records if arms[name].prune.multiplier > 1]
    if large:
        shown = {arms[name].title: records[name] for name in ("dense", *large)}
        panels = {
            "training loss": {title: _curve(found, "step/at", "step/loss") for title, found in shown.items()},
            metric: {title: _curve(found, "at", f"val/{first}") for title, found in shown.items()},
        }
        title = f"{task}: mean over {seeds} seeds; the band goes from the lowest to the highest"
        written.append(folder / "curves.png")
        draw_curves(panels, written[-1], across="steps", title=title)
    return written


def _every(tables: Sequence[Records]) -> list[RunRecord]:
    every = [record for records in tables for found in records.values() for record in found]
    if not every:
        raise DataError("there is no record to make a table of: run the benchmark first")
    return every


def _metrics(record: RunRecord) -> list[str]:
    """The task's metrics, the one that counts first."""
    others = [name.removeprefix("majority_") for name in record.results if name.startswith("majority_")]
    return [str(record.data["metric"]), *others]


def _majority(name: str, metrics: Sequence[str]) -> str:
    return "majority" if name == metrics[0] else f"majority_{name}"


def _first(found: Sequence[RunRecord]) -> list[float]:
    return values(found, _metrics(found[0])[0]) if found else []


def _means(records: Mapping[str, Records], arm: str) -> dict[int, float]:
    """Seed -> mean over all tasks, of the seeds that every task has."""
    scores = [
        {record.seeds["module"]: score for record, score in zip(found, _first(found), strict=True)}
        for found in (arms.get(arm, ()) for arms in records.values())
    ]
    return {seed: fmean(task[seed] for task in scores) for seed in scores[0] if all(seed in task for task in scores)}


def _size(found: Sequence[RunRecord]) -> dict[str, str]:
    results = found[0].results
    head, trained = int(results["head_parameters"]), int(results["trained_parameters"])
    return {"trained parameters": f"{trained - head:,} + head {head:,}", "kept share": f"{results['kept_share']:.1%}"}


def _dense(suite: Suite, records: Mapping[str, Records]) -> list[tuple[str, float, float]]:
    return [
        (f"{arm.title}{f' on {task}' if task else ''}", fmean(_first(found)), found[0].results["majority"])
        for task, arms in records.items()
        for arm in suite.arms
        if arm.dense and (found := arms.get(arm.name))
    ]


def _points(arms: Sequence[tuple[Arm, Sequence[RunRecord]]], key: str) -> Curve:
    """One point an arm, at the share that it removes; a single seed has no bar."""
    by_share = sorted(arms, key=lambda entry: entry[0].prune.share)
    intervals = [mean_interval(values(found, key)) for _, found in by_share]
    bars = [0.0 if math.isnan(interval.half_width) else interval.half_width for interval in intervals]
    means = [interval.mean for interval in intervals]
    return Curve(
        x=[100 * arm.prune.share for arm, _ in by_share],
        mean=means,
        low=[mean - bar for mean, bar in zip(means, bars, strict=True)],
        high=[mean + bar for mean, bar in zip(means, bars, strict=True)],
    )


def _curve(found: Sequence[RunRecord], at: str, key: str) -> Curve:
    """A series over the seeds, at the steps of the first."""
    columns = list(zip(*(record.series[key] for record in found), strict=True))
    return Curve(
        x=found[0].series[at], mean=[*map(fmean, columns)], low=[*map(min, columns)], high=[*map(max, columns)]
    )
