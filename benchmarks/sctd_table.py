"""The tables and the figure of the pretraining benchmark, made from its records and from nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.describe import context, values, warning
from benchmarks.sctd_arms import ARMS, Suite
from peft_lightning.atomic import atomic_write
from peft_lightning.errors import DataError
from peft_lightning.study.records import RunRecord, read_record
from peft_lightning.study.statistics import mean_interval
from peft_lightning.study.tables import markdown_table

__all__ = ["draw", "pretrain_table", "read_arms", "tuning_table", "verdict"]

Records = Mapping[str, Sequence[RunRecord]]

_CONTROL = "random"
# A model this far below the entropy of single words has learned from their neighbours.
_MARGIN = 0.5
# Training times may differ by this factor and still be called equal.
_EQUAL = 1.05
_COLOURS = {"mlm": "#4477aa", "token-drop": "#ee6677", "drop+full": "#228833", "sctd": "#aa3377"}
_NAMES = {"accuracy": "accuracy", "f1": "F1"}


def verdict(losses: Mapping[str, Sequence[float]], entropy: float, seeds: int) -> tuple[str | None, str]:
    """Return the arm with the lowest validation loss where it may be named, and what is to be said.

    It may be where all seeds of all arms are there, at least two; where each of its seeds lies half a nat below the
    unigram entropy; and where the next arm's mean is further away than the seeds of any one arm are from each other.

    Args:
        losses: arm -> final validation loss of each seed, in nats.
        entropy: cross-entropy of the unigram distribution on the same words.
        seeds: how many each arm should have.
    """
    if set(losses) != set(ARMS) or seeds < 2 or any(len(found) != seeds for found in losses.values()):
        return None, "No winner is named: not every arm has all its seeds, or there is only one."
    best, second, *_ = sorted(losses, key=lambda arm: fmean(losses[arm]))
    gap = fmean(losses[second]) - fmean(losses[best])
    spread = max(max(found) - min(found) for found in losses.values())
    below = entropy - max(losses[best])
    if below < _MARGIN:
        return None, (
            f"No winner is named: the lowest validation loss, that of {ARMS[best]}, lies {below:.3f} nat below the "
            f"unigram entropy of {entropy:.3f} with its worst seed, less than {_MARGIN}: too little was learned."
        )
    if not gap > spread:
        return None, (
            f"No winner is named: the two lowest validation losses, {ARMS[best]} and {ARMS[second]}, are {gap:.3f} nat "
            f"apart, and the seeds of one arm up to {spread:.3f}."
        )
    return best, (
        f"The lowest validation loss is that of {ARMS[best]}: {gap:.3f} nat below {ARMS[second]}, where the seeds of "
        f"one arm are at most {spread:.3f} apart, and at least {below:.3f} nat below the unigram entropy."
    )


def read_arms(suite: Suite, folder: Path, what: str) -> dict[str, list[RunRecord]]:
    """Return the records of ``pretrain`` or of a task by arm; arms without any are left out."""
    found = {
        arm: [read_record(path) for seed in suite.seeds if (path := folder / f"{what}-{arm}-seed{seed}.json").is_file()]
        for arm in (*ARMS, _CONTROL)
    }
    return {arm: records for arm, records in found.items() if records}


def pretrain_table(suite: Suite, records: Records) -> str:
    """Return the table of the pretrained arms, the verdict, and the line under it. Raises DataError for no record."""
    if not records:
        raise DataError("there is no record to make a table of: run the benchmark first")
    baseline, rows = records.get("mlm", []), []
    for arm, found in records.items():
        dropped = values(found, "dropped_loss") if "dropped_loss" in found[0].results else []
        compared = found if arm != "mlm" else []
        rows.append(
            {
                "arm": ARMS[arm],
                "seeds": str(len(found)),
                "steps": _range(values(found, "steps"), ",.0f"),
                "training s": _range(values(found, "training_seconds"), ".0f"),
                "tokens/s": _range(values(found, "tokens_per_second"), ",.0f"),
                "teacher steps": f"{fmean(values(found, 'teacher_share')):.1%}",
                "loss": str(mean_interval(values(found, "loss"))),
                "loss over mlm": _over(compared, baseline, "loss"),
                "accuracy": str(mean_interval(values(found, "accuracy"))),
                "accuracy over mlm": _over(compared, baseline, "accuracy"),
                "loss of the dropping pass": str(mean_interval(dropped)) if dropped else "",
            }
        )
    losses = {arm: values(found, "loss") for arm, found in records.items()}
    entropy = next(iter(records.values()))[0].results["unigram_entropy"]
    said = verdict(losses, entropy, len(suite.seeds))[1]
    return f"{markdown_table(rows)}\n\n{said}{_unequal(records)}\n\n{_context(suite, records)}"


def tuning_table(suite: Suite, records: Mapping[str, Records]) -> str:
    """Return the table of the tuned models, and the line under it. Raises DataError for no record.

    Args:
        suite: gives the arms and the subsamples.
        records: task -> arm -> records.
    """
    every = [record for arms in records.values() for found in arms.values() for record in found]
    if not every:
        raise DataError("there is no record to make a table of: run the benchmark first")
    metrics = {task: _metrics(next(iter(arms.values()))[0]) for task, arms in records.items()}
    rows: list[dict[str, str]] = []
    for arm in (*ARMS, _CONTROL):
        if not any(arm in arms for arms in records.values()):
            continue
        row = {"pretrained by": ARMS.get(arm, "nothing: the seed's initial weights")}
        for task, arms in records.items():
            found, baseline = arms.get(arm, []), arms.get("mlm", [])
            for name in metrics[task]:
                row[f"{task} {_NAMES[name]}"] = str(mean_interval(values(found, name))) if found else ""
            row[f"{task} over mlm"] = _over(found if arm != "mlm" else [], baseline, metrics[task][0])
        rows.append(row)
    constant = dict.fromkeys(rows[0], "") | {"pretrained by": "majority class"}
    for task, arms in records.items():
        results = next(iter(arms.values()))[0].results
        for number, name in enumerate(metrics[task]):
            constant[f"{task} {_NAMES[name]}"] = f"{results[f'majority_{name}' if number else 'majority']:.3f}"
    shares = [
        f"Of {task}, {trial.steps * trial.batch_size:,} random rows an epoch, the same for all arms of a seed."
        for task, trial in suite.tasks.items()
        if trial.steps is not None and task in records
    ]
    epochs = ", ".join(f"{task} {trial.epochs}" for task, trial in suite.tasks.items() if task in records)
    remark = f"Epochs: {epochs}; learning rate {suite.tune_lr:g}. {' '.join(shares)} {_OVER}"
    scores = [
        (f"{title} on {task}", fmean(values(arms[arm], metrics[task][0])), arms[arm][0].results["majority"])
        for task, arms in records.items()
        for arm, title in ARMS.items()
        if arm in arms
    ]
    return f"{markdown_table([*rows, constant])}\n\n{context(every, remark)}{warning(scores)}"


def draw(records: Records, path: Path, seeds: int) -> None:
    """Draw the validation loss over steps and over seconds: arms as colours, their seeds as thin lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    entropy = next(iter(records.values()))[0].results["unigram_entropy"]
    panels = {"at": "steps", "seconds": "seconds of training"}
    for axes, (across, name) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for arm, found in records.items():
            for number, record in enumerate(found):
                style: dict[str, Any] = {"color": _COLOURS[arm], "linewidth": 0.9}
                label = ARMS[arm] if number == 0 else None
                axes.plot(record.series[across], record.series["val/loss"], label=label, **style)
        axes.axhline(entropy, color="#555555", linestyle="--", linewidth=1, label="unigram entropy")
        axes.set_xlabel(name)
        axes.set_ylabel("validation loss, nats" if across == "at" else "")
        axes.legend(fontsize=8)
    figure.suptitle(f"full sequences, {seeds} seeds: a line each", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, lambda file: file.write(picture.getvalue()))


_OVER = "Differences to mlm are paired by seed: their mean, and in brackets the lowest and the highest."


def _over(found: Sequence[RunRecord], baseline: Sequence[RunRecord], key: str) -> str:
    """Return the mean difference of a result over the seeds that both arms have, the lowest and the highest."""
    by_seed = {record.seeds["module"]: record.results[key] for record in baseline}
    pairs = [(record.results[key], by_seed.get(record.seeds["module"])) for record in found]
    over = [value - other for value, other in pairs if other is not None]
    return f"{fmean(over):+.3f} ({min(over):+.3f} to {max(over):+.3f})" if over else ""


def _unequal(records: Records) -> str:
    """Say so where the machine was not as fast as planned for all, so that the comparison is not one at equal time."""
    seconds = [value for found in records.values() for value in values(found, "training_seconds")]
    ratio = max(seconds) / min(seconds)
    return f" **Unequal times:** the longest run trained {ratio:.2f} times the shortest." if ratio > _EQUAL else ""


def _range(found: Sequence[float], form: str) -> str:
    low, high = format(min(found), form), format(max(found), form)
    return low if low == high else f"{low} to {high}"


def _metrics(record: RunRecord) -> list[str]:
    others = [name.removeprefix("majority_") for name in record.results if name.startswith("majority_")]
    return [str(record.data["metric"]), *others]


def _context(suite: Suite, records: Records) -> str:
    every = [record for found in records.values() for record in found]
    first, recipe = every[0], suite.recipe
    results, device, versions = first.results, first.environment["device"], first.environment["versions"]
    commits = sorted(
        {str(r.environment["commit"])[:12] + (" with changes" if r.environment["dirty"] else "") for r in every}
    )
    tokens = max(values(every, "tokens"))
    read = tokens / (results["training_blocks"] * recipe.block_size)
    shape = f"{first.model['num_hidden_layers']} layers of width {first.model['hidden_size']}"
    seeds = ", ".join(str(seed) for seed in sorted({r.seeds["module"] for r in every}))
    return (
        f"Corpus {first.data['corpus']}: {results['training_blocks']:,.0f} blocks of {recipe.block_size} tokens to "
        f"train (read at most {read:.2f} times), {results['validation_blocks']:,.0f} to validate. {shape.capitalize()} "
        f"and {results['trained_parameters']:,.0f} parameters, {recipe.batch_size} blocks a step, peak rate "
        f"{recipe.optim.lr:g}, {recipe.precision}, Fi {recipe.interval}. Planned: {results['planned_seconds']:g} s of "
        f"training each, without validations. Loss (nats) and accuracy are of the full pass after the last step; the "
        f"unigram entropy of the same words is {results['unigram_entropy']:.3f}. Seeds {seeds}, each with the same "
        f"initial weights, blocks and masks for all arms: the mean and half the width of its 95 % t interval. {_OVER} "
        f"{device['name']}, {device['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {', '.join(commits)}."
    )
