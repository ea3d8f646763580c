"""MerA's tables as grids of ``peft_lightning.study``: arms become methods, sources folders, settings tasks and shots.

Adam's averages and the decay are the paper's (section 3.1) for all arms; AdapterFusion has no decay, which would pull
its values away from the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.mera_arms import Arm, Plan
from benchmarks.shared import data_folder
from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.tasks.prompts import prompted
from peft_lightning.tasks.table import get_task

__all__ = ["DEMO_SETS", "grid", "single_name"]

DEMO_SETS = 4
"""Sets of demonstrations whose answers are added up; LM-BFF takes 16, which is four times the time."""

_WORDS: dict[str, dict[str, str]] = {
    "sst2": {"negative": "bad", "positive": "good"},
    "mrpc": {"not_equivalent": "but", "equivalent": "thus"},
    "mnli": {"entailment": "thus", "neutral": "perhaps", "contradiction": "but"},
}
"""Instead of LM-BFF's words where the vocabulary was made here: its 8,192 words have neither terrible nor Yes."""

_TOYS = {"mrpc": "toy_pairs", "sst2": "toy_sentiment", "mnli": "toy_pairs"}
_BOTTLENECK, _TINY = 48, 6
_SHAPE: dict[str, Any] = {"kind": "pfeiffer", "bottleneck": _BOTTLENECK, "name": "merged"}
_OPTIM: dict[str, Any] = {"betas": [0.9, 0.98], "weight_decay": 0.1}


def single_name(source: str) -> str:
    """Name of the variant that starts from one source."""
    return f"from {source}"


def grid(
    plan: Plan,
    arms: Sequence[Arm],
    folders: Mapping[str, Path],
    model: BackboneConfig,
    *,
    seeds: Iterable[int],
    rates: Mapping[str, Sequence[float]],
    singles: Mapping[str, Sequence[str]],
    report: bool,
    fewest: bool = False,
    few_words: bool = False,
    workers: int = 1,
    tiny: bool = False,
) -> dict[str, Any]:
    """Return the grid of arms that read their tasks in one way.

    Args:
        plan: gives settings, epochs and sizes.
        arms: of one mode.
        folders: source -> its AdapterHub folder.
        model: the backbone; what is fine-tuned whole is held in float32.
        seeds: of the splits.
        rates: arm -> learning rates to run.
        singles: task -> sources of which each is a variant of the single adapter.
        report: False reads one test row, of cells that only the dev shots are looked at of, and implies ``fewest``.
        fewest: the fewest shots of each task alone.
        few_words: whether the backbone's vocabulary is the small one.
        workers: processes.
        tiny: toy tasks.
    """
    (mode,) = {arm.mode for arm in arms}
    tasks: dict[str, Any] = {}
    settings = plan.fewest if fewest or not report else plan.settings
    for task in plan.tasks:
        words = _WORDS[task] if few_words and not tiny else None
        named = _task(_TOYS[task] if tiny else task, mode, words)
        tasks[task] = {"task": named, "shots": [count for name, count in settings if name == task]}
    return {
        "backbone": _fields(model),
        "data": {
            **({} if tiny else {"root": str(data_folder())}),
            "batch_size": plan.batch_size,
            "max_length": plan.max_length,
            "test_rows": plan.test_rows if report else 1,
        },
        "tasks": tasks,
        "seeds": [*seeds],
        "epochs": [plan.epochs],
        "methods": {arm.name: _method(plan, arm, folders, rates[arm.name], singles, tiny) for arm in arms},
        "workers": workers,
        "device": "cpu",
    }


def _task(name: str, mode: str, words: dict[str, str] | None) -> str | dict[str, Any]:
    if mode == "head":
        return name
    options: dict[str, Any] = {} if mode == "prompt" else {"sets": DEMO_SETS}
    found = prompted(get_task(name), mode, **options, **({} if words is None else {"words": words}))
    return asdict(replace(found, folder=get_task(name).folder))


def _fields(model: BackboneConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(model).items() if value != getattr(BackboneConfig, name, None)}


def _method(
    plan: Plan,
    arm: Arm,
    folders: Mapping[str, Path],
    rates: Sequence[float],
    singles: Mapping[str, Sequence[str]],
    tiny: bool,
) -> dict[str, Any]:
    """An entry of ``methods``."""
    found: dict[str, Any] = {"lr": [*rates]} | ({"epochs": [0]} if arm.method == "zero" else {})
    arguments: dict[str, Any] = {"optim": _OPTIM}
    if arm.method == "full" or arm.method == "zero" and not arm.preset:
        arguments["backbone"] = {"dtype": "float32"}
        found |= {"class_path": "FineTuneModule", "precision": "bf16-mixed"}
    elif arm.method == "adapter" or arm.preset == "random":
        arguments |= {"adapter": _SHAPE | ({"bottleneck": _TINY} if tiny else {}), "prune": {"sparsity": 0.0}}
        found["class_path"] = "SparseAdapterModule"
    elif arm.method == "fusion":
        arguments["optim"] = _OPTIM | {"weight_decay": 0.0}
        found |= {"class_path": "FusionModule", "per_task": _starts(plan, arm, folders, singles)}
    else:
        # one source of weight 1 is what it was, whatever the preset
        merge: dict[str, Any] = {"preset": "avg" if arm.preset == "single" else arm.preset}
        if arm.wide:
            merge["recipe"] = {"width": len(arm.sources(plan.tasks[0])) * (_TINY if tiny else _BOTTLENECK)}
        arguments["merge"] = merge | ({} if arm.scale is None else {"scale": arm.scale})
        found |= {"class_path": "MerAModule", "per_task": _starts(plan, arm, folders, singles)}
    return found | {"init_args": arguments}


def _starts(
    plan: Plan, arm: Arm, folders: Mapping[str, Path], singles: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The sources of an arm for each task; for a single one a variant each."""
    if arm.preset == "single":
        return {
            task: {"variants": {single_name(name): {"sources": [str(folders[name])]} for name in singles[task]}}
            for task in plan.tasks
        }
    return {task: {"init_args": {"sources": [str(folders[name]) for name in arm.sources(task)]}} for task in plan.tasks}
