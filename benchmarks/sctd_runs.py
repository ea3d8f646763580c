"""Calibration, pretraining and the exported folders of the pretraining benchmark.

Each run writes one JSON file and is not repeated once that is there with the same settings. The seconds of a run are
those on the clock of ``callbacks/throughput.py``: without validations and the first step of either kind.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from benchmarks.runs import Run
from benchmarks.sctd_arms import ARMS, Suite, planned_steps
from benchmarks.shared import data_folder, file_digests
from peft_lightning import BackboneConfig, FineTuneModule, MLMDataModule, OptimConfig, SCTDPretrainModule
from peft_lightning.backbones.build import fingerprint
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.throughput import Throughput
from peft_lightning.errors import UsageError
from peft_lightning.study.memory import peak_bytes, reset_peak
from peft_lightning.study.records import RunRecord

__all__ = ["CONTROL", "calibrate", "pretrain", "tuning_runs", "unigram_entropy"]

CONTROL = "random"
_LOG_EVERY = 50


def unigram_entropy(training: Iterable[Tensor], validation: Iterable[Tensor], words: int) -> float:
    """Return the cross-entropy in nats of the training words' distribution, add-one smoothed, on validation words.

    This is what a model reaches that knows how frequent words are, and nothing else.

    Args:
        training: parts of the training words, any shape.
        validation: parts of the words to predict.
        words: size of the vocabulary.
    """
    counts, targets = np.ones(words), np.zeros(words)
    for part in training:
        counts += np.bincount(part.flatten().numpy(), minlength=words)
    for part in validation:
        targets += np.bincount(part.flatten().numpy(), minlength=words)
    return float(-(targets * np.log(counts / counts.sum())).sum() / targets.sum())


class _Windows(L.Callback):
    """Takes the time at the end of every cycle."""

    def __init__(self, interval: int) -> None:
        self._interval, self._stamps = interval, list[float]()

    @property
    def seconds(self) -> list[float]:
        """Of each window but the first, which may compile."""
        return [after - before for before, after in pairwise(self._stamps)]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        """At the end of a window, wait for the device and take the time."""
        if trainer.global_step % self._interval == 0:
            if module.device.type != "cpu":
                torch.accelerator.synchronize(module.device)
            self._stamps.append(time.perf_counter())


class _Watch(L.Callback):
    """Keeps what a run shows, an entry per validation; and what it began with."""

    def __init__(self, throughput: Throughput) -> None:
        self.series: dict[str, list[float]] = {}
        self.began: dict[str, str] = {}
        self._throughput, self._losses = throughput, list[Tensor]()

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Keep a digest of the initial weights."""
        self.began["initial_weights"] = fingerprint(module.model)["weights"]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep a digest of the first batch: its blocks and its masks."""
        if "first_batch" not in self.began:
            tensors = [batch[name].cpu().numpy().tobytes() for name in ("input_ids", "targets", "labels")]
            self.began["first_batch"] = hashlib.sha256(b"".join(tensors)).hexdigest()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        """Keep the loss where it is: looking at it would make a GPU wait."""
        self._losses.append(outputs["loss"].detach())

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep metrics, steps and seconds."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val/"}
        values["train/loss"] = float(torch.stack(self._losses).mean())
        values |= {"at": float(trainer.global_step), "seconds": self._throughput.totals["seconds"]}
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)
        self._losses = []


def _trainer(suite: Suite, steps: int, callbacks: Sequence[L.Callback], **options: Any) -> L.Trainer:
    recipe = suite.recipe
    settings: dict[str, Any] = {"limit_val_batches": 0, "logger": False, "val_check_interval": 1} | options
    return L.Trainer(
        accelerator="gpu" if recipe.device == "cuda" else "cpu",
        devices=1,
        precision=recipe.precision,  # type: ignore[arg-type]
        max_epochs=-1,
        max_steps=steps,
        check_val_every_n_epoch=None,
        log_every_n_steps=_LOG_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **settings,
    )


def calibrate(suite: Suite, settings: dict[str, Any], environment: dict[str, Any]) -> RunRecord:
    """Time the arms in turn, and return the record with the steps of each and what the corpus is like."""
    recipe, started = suite.recipe, time.perf_counter()
    data, modules = suite.data(suite.seeds[0]), {arm: suite.module(arm, suite.seeds[0]) for arm in ARMS}
    windows: dict[str, list[float]] = {arm: [] for arm in ARMS}
    names = list(ARMS)
    for turn in range(recipe.turns):
        # who goes first changes from turn to turn
        for arm in names[turn % len(names) :] + names[: turn % len(names)]:
            clock = _Windows(recipe.interval)
            _trainer(suite, recipe.interval * (1 + recipe.windows), [clock]).fit(modules[arm], datamodule=data)
            windows[arm] += clock.seconds
    steps = {arm: planned_steps(windows[arm], recipe.interval, recipe.budget, recipe.points) for arm in ARMS}
    return RunRecord(
        name="calibration",
        status="finished",
        config={"run": settings},
        data=_identity(suite),
        model={},
        seeds={"module": suite.seeds[0], "data": suite.seeds[0]},
        environment=environment,
        results={f"steps/{arm}": float(count) for arm, count in steps.items()} | _corpus(suite, data),
        series=windows,
        seconds=time.perf_counter() - started,
    )


def _identity(suite: Suite) -> dict[str, Any]:
    files = {} if suite.corpus is None else file_digests(data_folder() / suite.corpus, "*.parquet")
    return {"corpus": suite.corpus or "this repository's documents", "files": files}


def _corpus(suite: Suite, data: MLMDataModule) -> dict[str, float]:
    """How large the corpus is, and how far the frequencies of its words go."""
    data.setup("fit")
    tokenizer: Any = data.tokenizer
    special = torch.tensor(tokenizer.all_special_ids)

    def originals() -> Iterable[Tensor]:
        for batch in data.train_dataloader():
            ids = batch["input_ids"].scatter(1, batch["targets"], batch["labels"])
            yield ids[~torch.isin(ids, special)]

    checked = list(islice(data.val_dataloader(), suite.recipe.eval_batches))
    entropy = unigram_entropy(originals(), (batch["labels"][batch["valid"]] for batch in checked), data.vocabulary)
    return {
        "unigram_entropy": entropy,
        "training_blocks": float(len(data.train_dataloader()) * data.batch_size),
        "validation_blocks": float(sum(int(batch["valid"].sum()) for batch in checked)),
        "vocabulary": float(data.vocabulary),
    }


def pretrain(
    suite: Suite,
    arm: str,
    seed: int,
    settings: dict[str, Any],
    calibration: RunRecord,
    environment: dict[str, Any],
    folder: Path,
) -> RunRecord:
    """Train an arm, export it into ``folder``, and return the record."""
    module, data, started = suite.module(arm, seed), suite.data(seed), time.perf_counter()
    throughput = Throughput(_LOG_EVERY)
    watch = _Watch(throughput)
    log = folder.with_name(f"{folder.name}.log")
    shutil.rmtree(log, ignore_errors=True)  # of a run that was stopped
    log.mkdir(parents=True)
    csv, steps = MetricsCSV(log), int(settings["steps"])
    every = {"limit_val_batches": suite.recipe.eval_batches, "val_check_interval": steps // suite.recipe.points}
    reset_peak()
    _trainer(suite, steps, [throughput, watch], logger=csv, **every).fit(module, datamodule=data)
    module.export(folder, replace=True)
    totals = throughput.totals
    last = {name.removeprefix("val/"): values[-1] for name, values in watch.series.items() if name[:4] == "val/"}
    shown = ("teacher_share", "tokens_per_second", "mfu", "tokens")
    return RunRecord(
        name=f"pretrain-{arm}-seed{seed}",
        status="finished",
        config={"run": settings, "module": dict(module.hparams)},
        data=_identity(suite) | {"first_batch": watch.began["first_batch"]},
        model=_model(module) | {"initial_weights": watch.began["initial_weights"], "files": _weights(folder)},
        seeds={"module": seed, "data": seed},
        environment=environment,
        results=last
        | {name: float(totals[name]) for name in shown if name in totals}
        | {"steps": float(steps), "planned_seconds": suite.recipe.budget, "training_seconds": totals["seconds"]}
        | {name: calibration.results[name] for name in ("unigram_entropy", "training_blocks", "validation_blocks")}
        | {"trained_parameters": float(module.summary()["trained_parameters"])},
        series=watch.series | _divergence(csv.read()),
        memory_bytes=peak_bytes(),
        seconds=time.perf_counter() - started,
    )


def _model(module: SCTDPretrainModule) -> dict[str, Any]:
    return dict(module.backbone_fingerprint)


def _weights(folder: Path) -> dict[str, str]:
    return file_digests(folder, "*.safetensors")


def _divergence(rows: Sequence[Mapping[str, str]]) -> dict[str, list[float]]:
    """The share of the KL terms in the loss of semantic-consistent steps, over the steps; nothing without such."""
    found = [(float(row["step"]), float(row["train/kl_share"])) for row in rows if "train/kl_share" in row]
    finite = [pair for pair in found if math.isfinite(pair[1])]
    return {"kl/at": [step for step, _ in finite], "kl/share": [share for _, share in finite]} if finite else {}


def tuning_runs(suite: Suite, models: Path, pretrained: Mapping[str, RunRecord]) -> list[Run]:
    """Return the fine-tuning runs, seed by seed over all arms, the untrained control and all tasks.

    Args:
        suite: gives seeds, tasks and the control's weights, which are written where they are not there.
        models: folder of the exported ones.
        pretrained: name of an arm's folder -> its record.
    """
    runs = []
    for seed in suite.seeds:
        for arm in (*ARMS, CONTROL):
            name = f"{arm}-seed{seed}"
            if arm == CONTROL and not (models / name).is_dir():
                module = suite.module("mlm", seed)
                module.tokenizer = suite.data(seed).tokenizer
                module.export(models / name)
            weights = _weights(models / name) if arm == CONTROL else pretrained[name].model["files"]
            for task in suite.tasks:
                runs.append(_tuning(suite, arm, task, seed, models / name, weights))
    return runs


def _tuning(suite: Suite, arm: str, task: str, seed: int, folder: Path, weights: dict[str, str]) -> Run:
    def build() -> FineTuneModule:
        if _weights(folder) != weights:
            raise UsageError(f"{folder} is gone or another one: delete the record pretrain-{folder.name}.json too")
        backbone = BackboneConfig(name=str(folder))
        return FineTuneModule(task=task, backbone=backbone, optim=OptimConfig(lr=suite.tune_lr), seed=seed)

    trial = suite.tasks[task]
    settings = {"suite": suite.name, "arm": arm, "task": task, "seed": seed, "lr": suite.tune_lr}
    settings |= {"trial": asdict(trial), "weights": weights}
    name = f"{task}-{arm}-seed{seed}"
    return Run(name=name, settings=settings, seed=seed, build=build, trial=trial, toy=suite.corpus is None)
