"""The table of further kinds of task, made from their records and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.describe import context, difference, values, warning
from benchmarks.sparse_arms import Suite
from benchmarks.sparse_table import read_task
from peft_lightning.errors import DataError
from peft_lightning.study.records import RunRecord
from peft_lightning.study.statistics import mean_interval
from peft_lightning.study.tables import markdown_table
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import get_task

__all__ = ["kinds_table"]

_REMARK = (
    "A task with one seed has no interval. The first sentence of toy_copy is its answer, so there is none to beat."
)


def kinds_table(suites: Sequence[Suite], folder: Path) -> str:
    """Return a row a task and metric: dense, sparse, their difference and the trivial answer; and the line under it.

    Raises DataError where there is no record.
    """
    rows: list[dict[str, str]] = []
    every: list[RunRecord] = []
    dense: list[tuple[str, float, float]] = []
    for suite in suites:
        (task,) = suite.tasks
        records = read_task(suite, folder, task)
        found = [record for arm in records.values() for record in arm]
        if not found:
            continue
        every += found
        rows += _rows(suite, task, records)
        trivial = found[0].results["majority"]
        if "dense" in records and trivial < 1:
            dense.append((task, fmean(values(records["dense"], str(found[0].data["metric"]))), trivial))
    if not rows:
        raise DataError(f"{folder} has no record to make a table of: run the benchmark first")
    return f"{markdown_table(rows)}\n\n{context(every, _REMARK)}{_said(warning(dense))}"


def _rows(suite: Suite, task: str, records: dict[str, list[RunRecord]]) -> list[dict[str, str]]:
    """A row for each metric of a task; what does not depend on it stands in the first."""
    first = next(iter(records.values()))[0]
    kind = build_kind(get_task(str(first.data["task"])))
    minutes = fmean(record.seconds for arm in records.values() for record in arm) / 60
    rows = []
    for number, metric in enumerate(kind.task.metrics):
        cells = {arm.title: _cell(records.get(arm.name, []), metric) for arm in suite.arms}
        over = difference(records.get("snip40", []), records.get("dense", []), metric)
        trivial = first.results["majority" if number == 0 else f"majority_{metric}"]
        row = {"task": task, "metric": metric, **cells, "sparse over dense": over, "trivial answer": f"{trivial:.3f}"}
        about = {"which": kind.trivial, "seeds": str(len(suite.seeds)), "minutes a run": f"{minutes:.1f}"}
        rows.append(row | (about if number == 0 else dict.fromkeys(about, "")))
    return rows


def _cell(found: Sequence[RunRecord], metric: str) -> str:
    return str(mean_interval(values(found, metric))) if found else ""


def _said(text: str) -> str:
    return text.replace("the majority class", "the trivial answer")
