"""What a person reads when a run is over: a table, ``report.json`` and the exported adapter in the run's folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from peft_lightning.atomic import atomic_write
from peft_lightning.callbacks.checkpoint import RunCheckpoint
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.throughput import Throughput
from peft_lightning.errors import DataError
from peft_lightning.files.manifest import write_adapter
from peft_lightning.module import MethodModule
from peft_lightning.pretrain_module import PretrainModule
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.kinds.base import Rows

__all__ = ["Report", "baseline_scores"]


def baseline_scores(module: TaskModule, rows: Rows, stage: str) -> dict[str, float]:
    """The task's metrics of the trivial answer: the majority class, the mean, or what its kind calls so.

    Args:
        module: gives the task's kind.
        rows: the data.
        stage: that the answer is measured on.

    Returns:
        metric -> value; a correlation with a constant is 0.
    """
    metrics = module.kind.metrics()
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # one rank computes this alone
    for predictions, truths in module.kind.baseline(rows, stage):
        metrics.update(predictions, truths)
    return {name: float(torch.nan_to_num(value)) for name, value in metrics.compute().items()}


class Report(L.Callback):
    """Prints and writes the summary of a fit or a test, and exports what the method trained.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.seconds = 0.0
        self._start = 0.0
        self._trained, self._metrics = False, dict[str, Any]()

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent so far, over all processes of the run."""
        return {"seconds": self.seconds + time.monotonic() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a test counts its own seconds."""
        self.seconds, self._start = 0.0, time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for a validation outside a fit."""
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the last validation, which the trainer lets go when the fit has ended."""
        self._trained, self._metrics = True, dict(trainer.callback_metrics)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report on the last validation and export what was trained; all is saved by now, should something fail."""
        if not self._trained and (self.folder / "report.json").exists():
            return  # a run that was finished before
        self._report(trainer, pl_module, "val", "report.json")
        if not isinstance(pl_module, TaskModule | PretrainModule):
            return
        state = pl_module.owned_state()  # on all ranks: it may be sharded
        if trainer.is_global_zero and isinstance(pl_module, TaskModule):
            write_adapter(self.folder / "adapter", state, pl_module.manifest())
        elif trainer.is_global_zero and isinstance(pl_module, PretrainModule):
            pl_module.export(self.folder / "model", replace=True, state=state)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report on the test split."""
        self._report(trainer, pl_module, "test", "test.json")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report on the validation split, outside a fit."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val", "validate.json")

    def _report(self, trainer: L.Trainer, module: L.LightningModule, stage: str, name: str) -> None:
        if not trainer.is_global_zero or not isinstance(module, MethodModule):
            return
        split = {"val": "validation", "test": "test"}[stage]
        callbacks = getattr(trainer, "callbacks", [])
        best = next((c for c in callbacks if isinstance(c, RunCheckpoint)), None)
        fitting = trainer.state.fn == "fit"
        known = trainer.callback_metrics if not fitting else self._metrics or (best.metrics if best else {})
        scores = {
            key.removeprefix(f"{stage}/"): float(value) for key, value in known.items() if key.startswith(f"{stage}/")
        }
        limit = _limit(trainer, stage)
        whole = bool(scores) and not limit
        speed = next((c.totals for c in callbacks if isinstance(c, Throughput) and c.totals), None)
        report = {
            **module.summary(),
            "stage": split,
            **({"no_validation": _no_validation(trainer)} if fitting and not scores else {}),
            **({"limit": limit} if limit and scores else {}),
            **(self._task_part(trainer, module, split, whole) if isinstance(module, TaskModule) else {}),
            **({"best_score": best.best_score, "best_step": best.best_step} if best else {}),
            "scores": scores,
            **({"steps": trainer.global_step, "skipped_steps": module.skipped_steps} if fitting else {}),
            **({"throughput": speed} if speed and fitting else {}),
            **(_training_losses(trainer) if fitting else {}),
            "seconds": round(self.state_dict()["seconds"], 2),
            "run": str(self.folder),
        }
        text = json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"
        Console(soft_wrap=True, markup=False, highlight=False).print(_table(report, module))
        atomic_write(self.folder / name, lambda file: file.write(text.encode()))  # may fail; the table is out

    def _task_part(self, trainer: L.Trainer, module: TaskModule, split: str, whole: bool) -> dict[str, Any]:
        """The split, which examples were drawn, and the trivial answer's scores if the split was read as a whole."""
        data: Any = getattr(trainer, "datamodule", None)
        drawn = {"examples": data.regime()} if split != "test" and hasattr(data, "regime") else {}
        return {
            "split": getattr(data, "task", module.task).splits[split],
            **drawn,
            "constant": module.kind.trivial,
            "majority": self._majority(trainer, module, split) if whole else {},
        }

    @staticmethod
    def _majority(trainer: L.Trainer, module: TaskModule, split: str) -> dict[str, float]:
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "labels"):
            return {}
        try:
            return baseline_scores(module, data, split)
        except DataError:
            return {}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _limit(trainer: L.Trainer, stage: str) -> str:
    """The trainer's option that left batches of a split out, with its value; empty if it was read as a whole."""
    option = f"limit_{stage}_batches"
    value = getattr(trainer, option)
    loader = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
    count = len(loader) if isinstance(loader, Sized) else math.inf  # unknown where a run was finished before
    whole = value == 1.0 if isinstance(value, float) else value >= count
    return "" if whole else f"trainer.{option} {value}"


def _no_validation(trainer: L.Trainer) -> str:
    """Why a fit has no scores."""
    if not trainer.enable_validation:
        return "no data for it, or trainer.limit_val_batches 0"
    return "the run ended before trainer.val_check_interval"


def _table(report: dict[str, Any], module: MethodModule) -> Table:
    table = Table(show_header=False, title=f"{report['method']} on {report.get('task', 'text')}")
    if isinstance(module, TaskModule):
        _task_rows(table, report, module)
        shown = module.task.metrics[0]
    else:
        _text_rows(table, report)
        shown = str(getattr(module, "monitor", "")).rpartition("/")[2]
    if "no_validation" in report:
        table.add_row("validation", f"none: {report['no_validation']}")
    if report.get("best_step", -1) >= 0:
        table.add_row(f"best {shown}", f"{report['best_score']:.4f} at step {report['best_step']:,} (best.ckpt)")
    if "steps" in report:
        skipped = f", of them {report['skipped_steps']:,} skipped" if report["skipped_steps"] else ""
        table.add_row("optimizer steps", f"{report['steps']:,}{skipped}")
    table.add_row("seconds", f"{report['seconds']:.1f}")
    table.add_row("run's folder", report["run"])
    return table


def _training_losses(trainer: L.Trainer) -> dict[str, Any]:
    """The first and the last training loss of the log, each with its step."""
    logs = [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
    rows = [row for row in logs[0].read() if "train/loss" in row] if logs else []
    if len(rows) < 2:
        return {}
    ends = {"first": rows[0], "last": rows[-1]}
    return {"train_loss": {end: [int(row["step"]), float(row["train/loss"])] for end, row in ends.items()}}


def _text_rows(table: Table, report: dict[str, Any]) -> None:
    """What a masked language model has to say for itself."""
    table.add_row("trained parameters", f"{report['trained_parameters']:,}")
    table.add_row("model", f"{report['model_type']}, {report['layers']} layers of width {report['width']}")
    if "keep" in report:
        table.add_row("tokens kept", f"{report['keep']:.0%} in the middle layers ({report['preset']})")
    if "train_loss" in report:
        ends = [f"{loss:.4f} at step {step:,}" for step, loss in report["train_loss"].values()]
        table.add_row("training loss", ", ".join(ends))
    for name, value in report["scores"].items():
        table.add_row(f"{report['stage']} {name.replace('_', ' ')}", f"{value:.4f}")
    speed = report.get("throughput", {})
    if "tokens_per_second" in speed:
        used = f", {speed['mfu']:.1%} of the device's peak" if "mfu" in speed else ""
        table.add_row("tokens a second", f"{speed['tokens_per_second']:,.0f}{used}")
    if speed.get("teacher_share"):
        table.add_row("steps with a teacher", f"{speed['teacher_share']:.1%}")


def _task_rows(table: Table, report: dict[str, Any], module: TaskModule) -> None:
    """Parameters by part, what the method decided, and metrics beside the best constant answer's."""
    table.add_row(
        "trained parameters",
        f"{report['trained_parameters']:,}, of them {report['head_parameters']:,} in the head",
    )
    table.add_row("frozen parameters", f"{report['backbone_parameters']:,}")
    for name, text in module.lines().items():
        table.add_row(name, text)
    if drawn := report.get("examples"):
        each = " a class" if drawn["shots_mode"] == "per_class" else " in all"
        note = f", {drawn['reason']}" if drawn["reason"] else ""
        counts = f"{drawn['train']} to train on, {drawn['validation']} to choose by"
        table.add_row("examples", f"{drawn['shots']}{each}, seed {drawn['seed']}: {counts}{note}")
    for metric in module.task.metrics:
        if metric in report["scores"]:
            beside = report["majority"].get(metric)
            name = (
                report["stage"] if report["stage"] == report["split"] else f"{report['stage']} (on {report['split']})"
            )
            note = "" if beside is None else f"   ({report['constant']}: {beside:.4f})"
            note = f"   ({report['limit']})" if "limit" in report else note
            table.add_row(f"{name} {metric}", f"{report['scores'][metric]:.4f}{note}")
