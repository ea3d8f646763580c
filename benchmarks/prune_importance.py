"""Whether the heads' importance is signal: three seeds, three tasks, before and after the classifier has learned.

It is what ``peft-lightning importance`` writes, put on record.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared import backbone, data_folder
from peft_lightning.backbones.build import build_backbone
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.cli.importance import run_importance
from peft_lightning.study.records import RunRecord
from peft_lightning.study.tables import markdown_table

__all__ = ["importance_table", "measure_importances"]

_TASKS, _SEEDS = ("mrpc", "rte", "sst2"), "0,1,2"
_STEPS = (0, 100)


def measure_importances(tiny: bool, environment: dict[str, Any], folder: Path) -> RunRecord:
    """Measure, and leave the pictures (``heads-0.png``, ``heads-100.png``) in ``folder``.

    The record's results are rank correlations, by steps of the head: ``0/mrpc`` between seeds of a task,
    ``0/mrpc-rte`` between single seeds of two tasks.
    """
    started = time.perf_counter()
    results: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        chosen = backbone(tiny)
        name = _tiny_folder(Path(place)) if tiny else str(chosen.name)
        words = ["--batches", "2", "--batch_size", "8"] if tiny else ["--data", str(data_folder())]
        tasks = ("toy_sentiment", "toy_pairs") if tiny else _TASKS
        for steps in _STEPS:
            out = Path(place) / str(steps)
            options = ["--seeds", _SEEDS, "--classifier_steps", str(steps), "--out", str(out)]
            run_importance(["importance", "--backbone", name, "--task", ",".join(tasks), *options, *words])
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            results |= {f"{steps}/{key}": value for key, value in _correlations(report).items()}
            shutil.copyfile(out / "heads.png", folder / f"heads-{steps}.png")
        settings = {key: report[key] for key in ("batches", "batch_size", "max_length", "norm", "lr")}
        identity = report["backbone"]
    return RunRecord(
        name="importance",
        status="finished",
        config={"steps": list(_STEPS), "tasks": list(tasks), "seeds": _SEEDS, **settings},
        data={"tasks": list(tasks)},
        model=identity,
        seeds={},
        environment=environment,
        results=results,
        seconds=time.perf_counter() - started,
    )


def importance_table(record: RunRecord) -> str:
    """Return the rank correlations, a task or a pair of tasks a row, and the line under them."""
    columns = {0: "random head", 100: "head after 100 steps"}
    names = [name.removeprefix("0/") for name in record.results if name.startswith("0/")]
    rows = [
        {
            "importance of heads": _row(name),
            **{title: f"{record.results[f'{steps}/{name}']:.2f}" for steps, title in columns.items()},
        }
        for name in names
    ]
    config, environment = record.config, record.environment
    line = (
        f"Mean of Spearman's rank correlation over pairs of seeds ({config['seeds']}), each with another start of the "
        f"head and {config['batches'] * config['batch_size']} other rows. Norm per {config['norm']}. "
        f"{environment['device']['name']}; commit {str(environment['commit'])[:12]}."
    )
    return f"{markdown_table(rows)}\n\n{line}"


def _row(name: str) -> str:
    return f"{name.replace('-', ' and ')}, {'single seeds' if '-' in name else 'between seeds'}"


def _correlations(report: Mapping[str, Any]) -> dict[str, float]:
    found = {name: float(task["between_seeds"]["mean"]) for name, task in report["tasks"].items()}
    return found | {"-".join(pair["tasks"]): float(pair["single_seeds"]) for pair in report["between_tasks"]}


def _tiny_folder(place: Path) -> str:
    folder = place / "encoder"
    model: Any = build_backbone(backbone(tiny=True))
    model.save_pretrained(folder)
    load_tokenizer("toy").save_pretrained(folder)
    return str(folder)
