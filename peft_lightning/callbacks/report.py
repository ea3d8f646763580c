"""What a person reads when a run is over: a table, ``report.json`` and the exported adapter in the run's folder."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from peft_lightning.atomic import atomic_write
from peft_lightning.callbacks.checkpoint import RunCheckpoint
from peft_lightning.errors import DataError
from peft_lightning.files.manifest import write_adapter
from peft_lightning.task_module import TaskModule

__all__ = ["Report", "constant_scores"]


def constant_scores(module: TaskModule, train_labels: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The task's metrics of the best constant answer: the majority class, or the mean.

    Args:
        module: gives the task's kind.
        train_labels: ``[N]`` labels that the constant is chosen on.
        labels: ``[M]`` labels that it is measured on.

    Returns:
        metric -> value; a correlation with a constant is 0.
    """
    metrics = module.kind.metrics()
    for metric in metrics.values():
        metric.distributed_available_fn = lambda: False  # one rank computes this alone
    constant = module.kind.constant(train_labels)
    metrics.update(constant.expand(labels.shape).to(labels.dtype).contiguous(), labels)
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
        """Export the adapter and report on the last validation."""
        if trainer.is_global_zero and isinstance(pl_module, TaskModule):
            write_adapter(self.folder / "adapter", pl_module.owned_state(), pl_module.manifest())
        self._report(trainer, pl_module, "val", "report.json")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report on the test split."""
        self._report(trainer, pl_module, "test", "test.json")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report on the validation split, outside a fit."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "val", "validate.json")

    def _report(self, trainer: L.Trainer, module: L.LightningModule, stage: str, name: str) -> None:
        if not trainer.is_global_zero or not isinstance(module, TaskModule):
            return
        split = {"val": "validation", "test": "test"}[stage]
        scores = {
            key.removeprefix(f"{stage}/"): float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith(f"{stage}/")
        }
        best = next((c for c in getattr(trainer, "callbacks", []) if isinstance(c, RunCheckpoint)), None)
        data_task = getattr(getattr(trainer, "datamodule", None), "task", module.task)
        report = {
            **module.summary(),
            "stage": split,
            "split": data_task.splits[split],
            **({"best_score": best.best_score, "best_step": best.best_step} if best else {}),
            "scores": scores,
            "constant": "majority class" if module.task.labels else "the mean, always",
            "majority": self._majority(trainer, module, split),
            **({"steps": trainer.global_step} if trainer.state.fn == "fit" else {}),
            "seconds": round(self.state_dict()["seconds"], 2),
            "run": str(self.folder),
        }
        text = json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"
        atomic_write(self.folder / name, lambda file: file.write(text.encode()))
        Console(soft_wrap=True).print(_table(report, module.task.metrics))

    @staticmethod
    def _majority(trainer: L.Trainer, module: TaskModule, split: str) -> dict[str, float]:
        labels = getattr(getattr(trainer, "datamodule", None), "labels", None)
        if labels is None:
            return {}
        try:
            return constant_scores(module, labels("train"), labels(split))
        except DataError:
            return {}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(report: dict[str, Any], metrics: tuple[str, ...]) -> Table:
    table = Table(show_header=False, title=f"{report['method']} on {report['task']}")
    table.add_row(
        "trained parameters",
        f"{report['trained_parameters']:,}, of them {report['head_parameters']:,} in the head",
    )
    table.add_row("frozen parameters", f"{report['backbone_parameters']:,}")
    if "adapters" in report:
        table.add_row("adapters", f"{report['adapters']['kind']}, {len(report['adapters']['sites'])} places")
    if report["kept_share"] < 1:
        table.add_row(
            "kept share",
            f"{report['kept_share']:.4f} ({report['kept_weights']:,} of {report['prunable_weights']:,})",
        )
    else:
        every = f", {report['prunable_weights']:,} weights" if "prunable_weights" in report else ""
        table.add_row("kept share", f"1 (dense{every})")
    for metric in metrics:
        if metric in report["scores"]:
            beside = report["majority"].get(metric)
            name = (
                report["stage"] if report["stage"] == report["split"] else f"{report['stage']} (on {report['split']})"
            )
            note = "" if beside is None else f"   ({report['constant']}: {beside:.4f})"
            table.add_row(f"{name} {metric}", f"{report['scores'][metric]:.4f}{note}")
    if report.get("best_step", -1) >= 0:
        table.add_row(f"best {metrics[0]}", f"{report['best_score']:.4f} at step {report['best_step']:,} (best.ckpt)")
    if "steps" in report:
        table.add_row("optimizer steps", f"{report['steps']:,}")
    table.add_row("seconds", f"{report['seconds']:.1f}")
    table.add_row("run's folder", report["run"])
    return table
