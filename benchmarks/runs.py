"""Training runs that are recorded: one JSON file each, and one that is there is not repeated.

An interrupted benchmark goes on where it stopped. A run is on record if its file holds exactly its settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import lightning as L
from datasets import Dataset
from rich.console import Console

from benchmarks.shared import data_folder, file_digests
from peft_lightning import TaskDataModule
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.study.memory import peak_bytes, reset_peak
from peft_lightning.study.records import RunRecord, read_record, write_record
from peft_lightning.task_module import TaskModule

__all__ = ["Recorder", "Run", "Trial", "run_missing"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How the runs of a benchmark are trained.

    Attributes:
        epochs: over the training data.
        batch_size: rows of a step.
        max_length: tokens of a row at most.
        checks: validations in an epoch; 0: one after the last step.
        steps: batches of an epoch at most, or None for all.
        sample: rows to train on, the same in every run, or None for all.
        device: cpu or cuda.
        precision: the Trainer's.
    """

    epochs: int
    batch_size: int = 32
    max_length: int = 128
    checks: int = 1
    steps: int | None = None
    sample: int | None = None
    device: str = "cpu"
    precision: str = "32-true"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its record's name and settings, its seed, the untrained module and whether its task is a toy."""

    name: str
    settings: dict[str, Any]
    seed: int
    build: Callable[[], TaskModule]
    trial: Trial
    toy: bool


class Recorder(L.Callback):
    """Keeps what a run shows: losses, validation metrics, and the seconds of each step.

    ``series`` holds an entry per validation under each metric, under ``train/loss`` (the mean since the validation
    before) and under ``at`` (steps done); and an entry per ``block`` steps under ``step/loss`` (their mean) and
    ``step/at``.

    Args:
        block: steps in an entry of the losses.
    """

    def __init__(self, block: int = 5) -> None:
        self.series: dict[str, list[float]] = {}
        self.seconds: list[float] = []
        self.steps = 0
        self._block, self._losses, self._recent = block, list[float](), list[float]()
        self._started = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        """Stop it, and keep the loss."""
        self.seconds.append(time.perf_counter() - self._started)
        self.steps += 1
        self._losses.append(float(outputs["loss"]))
        self._recent.append(self._losses[-1])
        if len(self._recent) == self._block:
            self._add({"step/loss": fmean(self._recent), "step/at": float(self.steps)})
            self._recent = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the metrics."""
        if trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val/"}
        if self._losses:
            values["train/loss"] = fmean(self._losses)
        self._add(values | {"at": float(self.steps)})
        self._losses = []

    @property
    def validated(self) -> bool:
        """Whether the last step was followed by a validation."""
        return self.series.get("at", [-1.0])[-1] == self.steps

    def last(self) -> dict[str, float]:
        """What the last validation gave."""
        return {
            name.removeprefix("val/"): values[-1]
            for name, values in self.series.items()
            if name.startswith(("val/", "train/"))
        }

    def _add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)


def run_missing(runs: Iterable[Run], folder: Path, environment: dict[str, Any], say: Console) -> None:
    """Do the runs that are not on record in ``folder``, in order, and say how each went."""
    for run in runs:
        path = folder / f"{run.name}.json"
        if _finished(path, run.settings):
            say.print(f"{run.name}: on record")
            continue
        record = _record(run, environment)
        write_record(path, record)
        metric = str(record.data["metric"])
        say.print(f"{run.name}: {metric} {record.results[metric]:.3f} in {record.seconds:.0f} s")


def _finished(path: Path, settings: dict[str, Any]) -> bool:
    """Tell whether a run with exactly these settings is on record."""
    if not path.is_file():
        return False
    return read_record(path).config.get("run") == json.loads(json.dumps(settings))


def _record(run: Run, environment: dict[str, Any]) -> RunRecord:
    """Train and return the record."""
    module = run.build()
    root = None if run.toy else data_folder()
    rows = None if root is None or run.trial.sample is None else _sample(root / module.task.folder, run.trial.sample)
    data = TaskDataModule(
        task=module.task,
        root=None if root is None else str(root),
        rows=rows,
        batch_size=run.trial.batch_size,
        max_length=run.trial.max_length,
        seed=run.seed,
    )
    recorder = Recorder()
    reset_peak()
    started = time.perf_counter()
    _fit(module, data, recorder, run.trial)
    seconds = time.perf_counter() - started
    counts = {name: value for name, value in module.summary().items() if isinstance(value, int | float)}
    name = module.backbone_config.name
    weights = Path(name) if name is not None else None
    return RunRecord(
        name=run.name,
        status="finished",
        config={"run": run.settings, "module": _portable(dict(module.hparams))},
        data={
            "task": module.task.name,
            "metric": module.task.metrics[0],
            "train_rows": len(data.labels("train")),
            "validation_rows": len(data.labels("validation")),
            "files": {} if root is None else file_digests(root / module.task.folder, "*"),
        },
        model=module.backbone_fingerprint
        | {"files": {} if weights is None else file_digests(weights, "*.safetensors")},
        seeds={"module": run.seed, "data": run.seed},
        environment=environment,
        results=recorder.last()
        | counts
        | _majority(module, data)
        | {"seconds_per_step": median(recorder.seconds), "steps": recorder.steps},
        series=recorder.series,
        memory_bytes=peak_bytes(),
        seconds=seconds,
    )


def _sample(folder: Path, size: int) -> dict[str, Dataset]:
    """All rows to validate, and so many to train, drawn once for all runs."""
    train, validation = (Dataset.from_parquet(str(folder / f"{split}.parquet")) for split in ("train", "validation"))
    return {"train": train.shuffle(seed=0).select(range(size)), "validation": validation}


def _fit(module: TaskModule, data: TaskDataModule, recorder: Recorder, trial: Trial) -> None:
    """Train, with a validation after the last step whatever the checks before."""
    trainer = L.Trainer(
        accelerator="gpu" if trial.device == "cuda" else "cpu",
        devices=1,
        precision=trial.precision,  # type: ignore[arg-type]
        max_epochs=trial.epochs,
        val_check_interval=1 / max(1, trial.checks),
        check_val_every_n_epoch=1 if trial.checks else trial.epochs,
        limit_train_batches=trial.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[recorder],
    )
    trainer.fit(module, datamodule=data)
    if not recorder.validated:
        trainer.validate(module, datamodule=data, verbose=False)


def _majority(module: TaskModule, data: TaskDataModule) -> dict[str, float]:
    """The metrics of the constant answer that suits the validation rows best; ``majority`` is the task's first."""
    scores = baseline_scores(module, data, "validation")
    first = module.task.metrics[0]
    return {"majority" if name == first else f"majority_{name}": value for name, value in scores.items()}


def _portable(options: dict[str, Any]) -> dict[str, Any]:
    """Return a module's options with the encoder's folder cut to its last two names."""
    encoder = dict(options["backbone"])
    for key in ("name", "tokenizer"):
        if encoder.get(key) is not None:
            encoder[key] = "/".join(Path(encoder[key]).parts[-2:])
    return options | {"backbone": encoder}
