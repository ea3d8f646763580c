"""The table of the MRPC benchmark, made from its records and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.describe import context, difference, values, warning
from benchmarks.shared import ROOT
from peft_lightning.errors import DataError
from peft_lightning.study.records import RunRecord, read_record
from peft_lightning.study.statistics import mean_interval
from peft_lightning.study.tables import markdown_table, write_generated

__all__ = ["mrpc_table", "write_tables"]

_TITLES = {
    "full": "full fine-tuning",
    "houlsby": "Houlsby adapters, dense, backbone in bfloat16",
    "houlsby32": "Houlsby adapters, dense, backbone in float32",
    "snip40": "SparseAdapter, 40 % removed by SNIP, backbone in bfloat16",
}
_PLACES = {"README": ROOT / "README.md", "RESULTS": ROOT / "benchmarks" / "RESULTS.md"}


def write_tables(folder: Path, arms: Sequence[str], places: Sequence[str]) -> str:
    """Return the table of the records in ``folder``, after writing it into the named Markdown files."""
    records = {arm: [read_record(path) for path in sorted(folder.glob(f"{arm}-seed*.json"))] for arm in arms}
    text = mrpc_table({arm: found for arm, found in records.items() if found})
    for place in places:
        write_generated(_PLACES[place], "mrpc", text)
    return text


def mrpc_table(records: Mapping[str, Sequence[RunRecord]]) -> str:
    """Return the table and the line under it. Raises DataError where there is no record."""
    every = [record for found in records.values() for record in found]
    if not every:
        raise DataError("there is no record to make a table of: run the benchmark first")
    baseline = records.get("full", [])
    rows = [_row(name, found, baseline) for name, found in records.items()]
    majority = every[0].results["majority"]
    empty = dict.fromkeys(rows[0], "")
    rows.append(empty | {"arm": "majority class", "accuracy": f"{majority:.3f}", "trained parameters": "0"})
    dense = [
        (_TITLES[name], fmean(values(records[name], "accuracy")), majority)
        for name in ("full", "houlsby", "houlsby32")
        if records.get(name)
    ]
    under = context(every, "A step's seconds are the median over a run.")
    return f"{markdown_table(rows)}\n\n{under}{warning(dense)}"


def _row(name: str, found: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, str]:
    first = found[0].results
    head = int(first["head_parameters"])
    step, full_step = fmean(values(found, "seconds_per_step")), values(baseline, "seconds_per_step")
    return {
        "arm": _TITLES.get(name, name),
        "seeds": str(len(found)),
        "accuracy": str(mean_interval(values(found, "accuracy"))),
        "F1": str(mean_interval(values(found, "f1"))),
        "accuracy over full": "" if name == "full" else difference(found, baseline, "accuracy"),
        "trained parameters": f"{int(first['trained_parameters']) - head:,} + head {head:,}",
        "kept share": f"{first['kept_share']:.1%}",
        "s per step": f"{step:.3f}",
        "step over full": f"{step / fmean(full_step):.2f}" if full_step else "",
    }
