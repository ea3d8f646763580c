"""What the tables of several benchmarks say in the same way."""

from __future__ import annotations

from collections.abc import Sequence

from peft_lightning.study.records import RunRecord
from peft_lightning.study.statistics import paired_interval

__all__ = ["context", "difference", "values", "warning"]

_MARGIN = 0.05


def values(found: Sequence[RunRecord], key: str) -> list[float]:
    """Return one result of each record."""
    return [record.results[key] for record in found]


def difference(found: Sequence[RunRecord], baseline: Sequence[RunRecord], key: str) -> str:
    """Return the mean difference of a result and its interval over the seeds that both arms have, or nothing."""
    by_seed = {record.seeds["module"]: record for record in baseline}
    both = [record for record in found if record.seeds["module"] in by_seed]
    partners = [by_seed[record.seeds["module"]] for record in both]
    return paired_interval(values(both, key), values(partners, key)).format() if both else ""


def context(every: Sequence[RunRecord], remark: str) -> str:
    """Return the line under a table: data, model, seeds, a remark on the columns, machine, versions and commits."""
    first = every[0]
    commits = sorted(
        {str(r.environment["commit"])[:12] + (" with changes" if r.environment["dirty"] else "") for r in every}
    )
    sizes = {r.data["task"]: (r.data["train_rows"], r.data["validation_rows"]) for r in every}
    tasks = "; ".join(
        f"{task}: {train:,} rows to train and {val:,} to validate" for task, (train, val) in sizes.items()
    )
    device = first.environment["device"]
    versions = first.environment["versions"]
    seeds = ", ".join(str(seed) for seed in sorted({r.seeds["module"] for r in every}))
    kind = first.model["model_type"].upper()
    shape = f"{first.model['num_hidden_layers']} layers of width {first.model['hidden_size']}"
    return (
        f"Task {tasks}. {kind} encoder, {shape}. "
        f"Seeds {seeds}: the mean and half the width of its 95 % t interval; differences are paired by seed. "
        f"Metrics are those after the last epoch. {remark} "
        f"{device['name']}, {device['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {', '.join(commits)}."
    )


def warning(scores: Sequence[tuple[str, float, float]]) -> str:
    """Say so where a dense arm does not beat the majority class clearly: then nothing in the table is a result.

    Args:
        scores: title, mean metric and the majority class's metric of each dense arm.
    """
    weak = [title for title, score, majority in scores if score < majority + _MARGIN]
    return f"\n\n**Failed setup:** less than 5 points over the majority class: {', '.join(weak)}." if weak else ""
