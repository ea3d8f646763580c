"""The table of the MRPC benchmark, made from its records and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.shared import ROOT
from peft_lightning.errors import DataError
from peft_lightning.study.records import RunRecord, read_record
from peft_lightning.study.statistics import mean_interval, paired_interval
from peft_lightning.study.tables import markdown_table, write_generated

__all__ = ["mrpc_table", "write_tables"]

_TITLES = {
    "full": "full fine-tuning",
    "houlsby": "Houlsby adapters, dense, backbone in bfloat16",
    "houlsby32": "Houlsby adapters, dense, backbone in float32",
    "snip40": "SparseAdapter, 40 % removed by SNIP, backbone in bfloat16",
}
_MARGIN = 0.05
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
    return f"{markdown_table(rows)}\n\n{_context(every)}{_warning(records, majority)}"


def _row(name: str, found: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, str]:
    first = found[0].results
    head = int(first["head_parameters"])
    step, full_step = fmean(_values(found, "seconds_per_step")), _values(baseline, "seconds_per_step")
    return {
        "arm": _TITLES.get(name, name),
        "seeds": str(len(found)),
        "accuracy": str(mean_interval(_values(found, "accuracy"))),
        "F1": str(mean_interval(_values(found, "f1"))),
        "accuracy over full": "" if name == "full" else _difference(found, baseline),
        "trained parameters": f"{int(first['trained_parameters']) - head:,} + head {head:,}",
        "kept share": f"{first['kept_share']:.1%}",
        "s per step": f"{step:.3f}",
        "step over full": f"{step / fmean(full_step):.2f}" if full_step else "",
    }


def _values(found: Sequence[RunRecord], key: str) -> list[float]:
    return [record.results[key] for record in found]


def _difference(found: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> str:
    """Return the mean difference of accuracy over the seeds that both arms have."""
    full = {record.seeds["module"]: record for record in baseline}
    both = [record for record in found if record.seeds["module"] in full]
    partners = [full[record.seeds["module"]] for record in both]
    return paired_interval(_values(both, "accuracy"), _values(partners, "accuracy")).format() if both else ""


def _context(every: Sequence[RunRecord]) -> str:
    first = every[0]
    commits = sorted(
        {str(r.environment["commit"])[:12] + (" with changes" if r.environment["dirty"] else "") for r in every}
    )
    device = first.environment["device"]
    versions = first.environment["versions"]
    seeds = ", ".join(str(seed) for seed in sorted({r.seeds["module"] for r in every}))
    kind = first.model["model_type"].upper()
    shape = f"{first.model['num_hidden_layers']} layers of width {first.model['hidden_size']}"
    return (
        f"Task {first.data['task']}: {first.data['train_rows']:,} rows to train and "
        f"{first.data['validation_rows']:,} to validate. {kind} encoder, {shape}. "
        f"Seeds {seeds}: the mean and half the width of its 95 % t interval; differences are paired by seed. "
        f"Metrics are those after the last epoch. A step's seconds are the median over a run. "
        f"{device['name']}, {device['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {', '.join(commits)}."
    )


def _warning(records: Mapping[str, Sequence[RunRecord]], majority: float) -> str:
    """Say so where a dense arm does not beat the majority class clearly: then nothing here is a result."""
    weak = [
        _TITLES.get(name, name)
        for name in ("full", "houlsby", "houlsby32")
        if records.get(name) and fmean(_values(records[name], "accuracy")) < majority + _MARGIN
    ]
    return f"\n\n**Failed setup:** less than 5 points over the majority class: {', '.join(weak)}." if weak else ""
