"""The tables of the Prune-LoRA benchmark, made from its records and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks.describe import context, difference, values, warning
from benchmarks.prune_arms import ARMS, Preset, Suite
from benchmarks.prune_models import SHAPES
from peft_lightning.errors import DataError
from peft_lightning.study.records import RunRecord, read_record
from peft_lightning.study.statistics import mean_interval
from peft_lightning.study.tables import markdown_table

__all__ = ["accuracy_table", "cost_tables", "read_suite"]

_TITLES = {arm.name: arm.title for arm in ARMS}
_TIMED = {
    "full": "full fine-tuning",
    "lora": "LoRA, nothing removed",
    "prune": "Prune-LoRA, 44 of 144 heads gone",
    "ffn": "Prune-LoRA, 30 % of the neurons too",
}
# what, shape -> (numerator, denominator), ratio to reach
_RATIOS: tuple[tuple[str, str, str, float | None], ...] = (
    ("inference, 32 rows: 44 heads gone / dense", "infer32/prune", "infer32/lora", 0.91),
    ("inference, 1 row: 44 heads gone / dense", "infer1/prune", "infer1/lora", 0.91),
    ("inference, 32 rows: 30 % of the neurons gone too / dense", "infer32/ffn", "infer32/lora", 0.75),
    ("inference, 1 row: 30 % of the neurons gone too / dense", "infer1/ffn", "infer1/lora", 0.75),
    ("training step: Prune-LoRA / LoRA of the same ranks and targets", "step/prune", "step/lora", 0.93),
    ("training step: with 30 % of the neurons gone too / the same LoRA", "step/ffn", "step/lora", None),
    ("training step: Prune-LoRA / full fine-tuning", "step/prune", "step/full", None),
    ("peak memory of training: Prune-LoRA / full fine-tuning", "memory_train/prune", "memory_train/full", 0.75),
    ("peak memory of inference: 44 heads gone / dense", "memory_infer/prune", "memory_infer/lora", None),
    ("importance of heads / forward and backward of LoRA", "importance/heads", "importance/passes_lora", 1.1),
    ("importance of heads / forward and backward of all weights", "importance/heads", "importance/passes_full", 1.1),
    ("importance of heads and neurons / that of LoRA", "importance/neurons", "importance/passes_lora", None),
)

Records = Mapping[str, Mapping[str, Sequence[RunRecord]]]


def read_suite(suite: Suite, preset: Preset, folder: Path) -> dict[str, dict[str, list[RunRecord]]]:
    """Return the records by task and arm, in the suite's order; what has none is left out."""
    found = {
        task: {
            arm.name: [
                read_record(path)
                for seed in seeds
                if (path := folder / f"{suite.stem(task, preset, arm, seed)}.json").is_file()
            ]
            for arm in ARMS
        }
        for task, seeds in suite.tasks.items()
    }
    kept = {task: {name: records for name, records in arms.items() if records} for task, arms in found.items()}
    return {task: arms for task, arms in kept.items() if arms}


def accuracy_table(records: Records) -> str:
    """Return accuracy, an arm a row and a task a column, what heads by importance gain on drawn ones, and sizes.

    Raises DataError for no record.
    """
    every = [record for arms in records.values() for found in arms.values() for record in found]
    if not every:
        raise DataError("there is no record to make a table of: run the benchmark first")
    rows = []
    for name, title in _TITLES.items():
        by_task = {task: arms[name] for task, arms in records.items() if name in arms}
        if by_task:
            cells = {task: _score(by_task.get(task, [])) for task in records}
            rows.append({"arm": title, **cells, **_size(next(iter(by_task.values())))})
    blank = dict.fromkeys(rows[0], "")
    over = {task: _over(arms) for task, arms in records.items()}
    rows.append(blank | {"arm": "heads by importance less heads at random"} | over)
    majority = {task: f"{next(iter(arms.values()))[0].results['majority']:.3f}" for task, arms in records.items()}
    rows.append(blank | {"arm": "majority class"} | majority)
    weak = [
        (f"{_TITLES[name]} on {task}", fmean(_values(arms[name])), arms[name][0].results["majority"])
        for task, arms in records.items()
        for name in ("full", "lora")
        if name in arms
    ]
    remark = "The backbone's parameters are what is left of it; LoRA is folded in before it is used."
    return f"{markdown_table(rows)}\n\n{context(every, remark)}{warning(weak)}"


def cost_tables(record: RunRecord) -> str:
    """Return the sizes and costs of both encoders (the paper's tables 2 to 4), the ratios, and the line under them."""
    shapes = [shape for shape in SHAPES if f"{shape}/step/full" in record.results]
    parts = []
    for shape in shapes:
        parts.append(f"{shape.replace('minilm', 'MiniLM').replace('bert-base', 'BERT-base')}'s width, 12 layers:")
        parts.append(markdown_table([_costs(record, shape, name) for name in _TIMED]))
    rows = []
    for what, one, other, goal in _RATIOS:
        cells = {shape: _ratio(record, f"{shape}/{one}", f"{shape}/{other}") for shape in shapes}
        rows.append({"ratio": what, **cells, "goal": "" if goal is None else f"at most {goal}"})
    environment, config = record.environment, record.config
    changes = " with changes" if environment["dirty"] else ""
    line = (
        f"Random weights in float32, texts of {config['tokens']} random tokens, {config['rows']} a batch where nothing "
        f"else is said; importance over 100 texts. Medians of {config['turns']} turns, ratios turn by turn. Inference "
        f"is of the merged model. Memory: the resident set's peak over three steps, less that of a process that has "
        f"built nothing; median of {config['memory_repeats']} processes. {environment['device']['name']}, "
        f"{config['threads']} threads; torch {environment['versions']['torch']}; commit "
        f"{str(environment['commit'])[:12]}{changes}."
    )
    return "\n\n".join([*parts, markdown_table(rows), line])


def _costs(record: RunRecord, shape: str, name: str) -> dict[str, str]:
    results = {key.removeprefix(f"{shape}/"): value for key, value in record.results.items()}
    total, trained = results[f"parameters/{name}"], results[f"trained/{name}"]
    deployed = "lora" if name == "full" else name  # full fine-tuning leaves a model of the dense one's cost
    return {
        "": _TIMED[name],
        "parameters": f"{total / 1e6:.2f} M",
        "trained": f"{trained / 1e3:,.1f} K ({trained / total:.2%})",
        "GFLOP a text": f"{results[f'flops/{name}'] / 1e9:.2f}",
        "memory of training": _mebibytes(results.get(f"memory_train/{name}")),
        "of inference": _mebibytes(results.get(f"memory_infer/{deployed}")),
        "training step": f"{1e3 * results[f'step/{name}']:.0f} ms",
        "inference, 32 rows": f"{1e3 * results[f'infer32/{deployed}']:.0f} ms",
        "1 row": f"{1e3 * results[f'infer1/{deployed}']:.1f} ms",
    }


def _mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"


def _ratio(record: RunRecord, one: str, other: str) -> str:
    """The median of the ratios turn by turn; nothing where a side was not measured."""
    if not {one, other} <= record.series.keys():
        return ""
    return f"{median(a / b for a, b in zip(record.series[one], record.series[other], strict=True)):.3f}"


def _values(found: Sequence[RunRecord]) -> list[float]:
    return values(found, str(found[0].data["metric"]))


def _score(found: Sequence[RunRecord]) -> str:
    if not found:
        return ""
    scores = _values(found)
    return str(mean_interval(scores)) if len(scores) > 1 else f"{scores[0]:.3f}"


def _over(arms: Mapping[str, Sequence[RunRecord]]) -> str:
    ours, drawn = arms.get("prune", []), arms.get("random", [])
    if not ours or not drawn:
        return ""
    metric = str(ours[0].data["metric"])
    if len(ours) > 1:
        return difference(ours, drawn, metric)
    return f"{_values(ours)[0] - _values(drawn)[0]:+.3f}"


def _size(found: Sequence[RunRecord]) -> dict[str, str]:
    results = found[0].results
    head, trained = int(results["head_parameters"]), int(results["trained_parameters"])
    left = int(results.get("parameters_left", 0)) or int(results["backbone_parameters"] + trained - head)
    return {
        "backbone left": f"{left / 1e6:.2f} M",
        "trained parameters": f"{trained - head:,} + head {head:,}",
        "s per step": f"{results['seconds_per_step']:.3f}",
    }
