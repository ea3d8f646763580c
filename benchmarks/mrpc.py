"""Accuracy on MRPC: full fine-tuning, dense Houlsby adapters, and these with 40 % removed by SNIP.

Every run writes one JSON file, and a run whose file is there is not repeated, so an interrupted benchmark
goes on where it stopped. All arms share a seed's order of data; the adapters' frozen backbone is held in
bfloat16. The number of an arm is the validation metric after its last epoch: no epoch is chosen by looking.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import lightning as L
import torch
from rich.console import Console

from benchmarks.mrpc_table import write_tables
from benchmarks.shared import ROOT, backbone, clean_environment, data_folder, file_digests
from peft_lightning import FineTuneModule, OptimConfig, PruneConfig, SparseAdapterModule, TaskDataModule
from peft_lightning.errors import PeftLightningError
from peft_lightning.study.memory import peak_bytes, reset_peak
from peft_lightning.study.records import RunRecord, read_record, write_record

__all__ = ["ARMS", "Arm", "main"]

_CONSOLE = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of the comparison; ``sparsity`` None means full fine-tuning."""

    name: str
    sparsity: float | None
    lr: float
    epochs: int
    dtype: str
    seeds: tuple[int, ...] = (0, 1, 2)

    def settings(self) -> dict[str, Any]:
        """Return what a run of this arm is made of, for its record."""
        return {name: value for name, value in asdict(self).items() if name != "seeds"}

    def module(self, seed: int, tiny: bool) -> FineTuneModule | SparseAdapterModule:
        """Return the untrained module of a seed."""
        task = "toy_pairs" if tiny else "mrpc"
        encoder, optim = backbone(tiny, self.dtype), OptimConfig(lr=self.lr)
        if self.sparsity is None:
            return FineTuneModule(task=task, backbone=encoder, optim=optim, seed=seed)
        prune = PruneConfig(sparsity=self.sparsity, score="snip")
        return SparseAdapterModule(task=task, backbone=encoder, prune=prune, optim=optim, seed=seed)


ARMS = (
    Arm(name="full", sparsity=None, lr=1e-4, epochs=3, dtype="float32"),
    Arm(name="houlsby", sparsity=0.0, lr=1e-3, epochs=5, dtype="bfloat16"),
    # Against "houlsby": what holding the frozen backbone in bfloat16 does to the metric. A third seed would take the
    # whole past 45 minutes.
    Arm(name="houlsby32", sparsity=0.0, lr=1e-3, epochs=5, dtype="float32", seeds=(0, 1)),
    Arm(name="snip40", sparsity=0.4, lr=1e-3, epochs=5, dtype="bfloat16"),
)


class _Recorder(L.Callback):
    """Keeps what a run shows: losses, validation metrics by epoch, and the seconds of each step."""

    def __init__(self) -> None:
        self.series: dict[str, list[float]] = {}
        self.steps: list[float] = []
        self._losses: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        """Stop it, and keep the loss."""
        self.steps.append(time.perf_counter() - self._started)
        self._losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the metrics of an epoch."""
        if trainer.sanity_checking:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val/"}
        for name, value in (values | {"train/loss": fmean(self._losses)}).items():
            self.series.setdefault(name, []).append(value)
        self._losses = []


def _run(arm: Arm, seed: int, settings: dict[str, Any], environment: dict[str, Any]) -> RunRecord:
    """Train one arm with one seed and return its record."""
    tiny = settings["tiny"]
    module = arm.module(seed, tiny)
    root = None if tiny else data_folder()
    data = TaskDataModule(
        task=module.task,
        root=None if root is None else str(root),
        batch_size=settings["batch_size"],
        seed=seed,
    )
    recorder = _Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=settings["epochs"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[recorder],
    )
    reset_peak()
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    labels = data.labels("validation")
    last = {name.removeprefix("val/"): values[-1] for name, values in recorder.series.items()}
    counts = {name: value for name, value in module.summary().items() if isinstance(value, int | float)}
    majority = float(torch.bincount(labels.long()).max()) / len(labels)
    weights = module.backbone_config.name
    return RunRecord(
        name=f"{arm.name}-seed{seed}",
        status="finished",
        config={"run": settings, "module": _portable(dict(module.hparams))},
        data={
            "task": module.task.name,
            "train_rows": len(data.labels("train")),
            "validation_rows": len(labels),
            "files": {} if root is None else file_digests(root / module.task.folder, "*"),
        },
        model=module.backbone_fingerprint
        | {"files": {} if weights is None else file_digests(Path(weights), "*.safetensors")},
        seeds={"module": seed, "data": seed},
        environment=environment,
        results=last
        | counts
        | {"majority": majority, "seconds_per_step": median(recorder.steps), "steps": len(recorder.steps)},
        series=recorder.series,
        memory_bytes=peak_bytes(),
        seconds=seconds,
    )


def _portable(options: dict[str, Any]) -> dict[str, Any]:
    """Return a module's options with the encoder's folder cut to its last two names."""
    encoder = dict(options["backbone"])
    if encoder["name"] is not None:
        encoder["name"] = "/".join(Path(encoder["name"]).parts[-2:])
    return options | {"backbone": encoder}


def _finished(path: Path, settings: dict[str, Any]) -> bool:
    """Tell whether a run with exactly these settings is on record."""
    if not path.is_file():
        return False
    return read_record(path).config.get("run") == settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mrpc", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try it in a minute: toy data, random encoder, no tables")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the records say so")
    parser.add_argument("--out", type=Path, help="folder of the records")
    options = parser.parse_args(arguments)
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "mrpc"
    folder: Path = options.out or default
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = clean_environment(options.allow_dirty or options.tiny)
    turns = [(seed, arm) for seed in (0, 1, 2) for arm in ARMS if seed in arm.seeds[: 2 if options.tiny else None]]
    for seed, arm in turns:
        epochs = 1 if options.tiny else arm.epochs
        settings = arm.settings() | {"seed": seed, "epochs": epochs, "batch_size": 32, "tiny": options.tiny}
        path = folder / f"{arm.name}-seed{seed}.json"
        if _finished(path, settings):
            _CONSOLE.print(f"{path.stem}: on record")
            continue
        record = _run(arm, seed, settings, environment)
        write_record(path, record)
        _CONSOLE.print(f"{path.stem}: accuracy {record.results['accuracy']:.3f} in {record.seconds:.0f} s")
    _CONSOLE.print(write_tables(folder, [arm.name for arm in ARMS], () if options.tiny else ("README", "RESULTS")))


if __name__ == "__main__":
    try:
        main()
    except PeftLightningError as error:
        _CONSOLE.print(f"error: {error}")
        sys.exit(error.exit_code)
