"""The adapters that MerA merges, trained here: five tracks of tasks, as the paper's section 3.4 has them.

Pfeiffer adapters with 48 ReLU neurons on the frozen bfloat16 encoder, each from initial values of its own: adapters
that start alike may be aligned already. A track has sources for every target; those that *are* a target are used for it
only where leakage is shown on purpose (the paper merges multinli for MNLI and mrpc for MRPC). Of the others, rows that
share a whole text of 20 letters with any row of a target, training rows too, are left out: two thirds of Rotten
Tomatoes are SST-2's training sentences, a tenth of STS-B is MRPC's. Each record says how many, and what the adapter
reaches on rows of its own task beside the trivial answer.

A source is trained once: its folder's name is a digest of all that decides it. Adapters of the pretrained encoder are
kept beside the results, without their heads and in float16, so that the tables can be made again without training them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import pyarrow.parquet as pq
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.runs import Recorder
from benchmarks.shared import data_folder, file_digests
from peft_lightning import AdapterConfig, BackboneConfig, OptimConfig, PruneConfig, SparseAdapterModule, TaskDataModule
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import UsageError
from peft_lightning.exchange import export_adapter
from peft_lightning.study.records import RunRecord, read_record, write_record
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import get_task

__all__ = ["SOURCES", "TARGETS", "Source", "sources_of", "train_missing"]

TARGETS = ("mrpc", "sst2", "mnli")
"""Tasks that the merged adapters are tuned on."""

_REVISION = 2  # of what this file does beyond the settings: a new number trains all sources again
_LETTERS = 20  # shorter texts are alike by chance: SST-2 has single words
_BOTTLENECK = 48


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one adapter is trained.

    Attributes:
        task: a row of the task table, and the adapter's name.
        track: QA, NLI, Sentiment, STS or Comsense.
        seed: of initial values, dropout and the order of rows.
        epochs: over its rows.
        rows: at most.
        dev_rows: at most, for its score.
        max_length: tokens of a row at most.
        toy: the task that stands for it in a quick trial.
        batch_size: rows of a step.
        lr: learning rate.
    """

    task: str
    track: str
    seed: int
    epochs: int
    rows: int = 10_000
    dev_rows: int = 500
    max_length: int = 128
    toy: str = "toy_pairs"
    batch_size: int = 32
    lr: float = 1e-3

    @property
    def is_target(self) -> bool:
        """Whether merging it for the target of its name shows the target to the adapter."""
        return self.task in TARGETS


# Epochs are such that each takes one to three minutes on two cores.
_ROWS = (
    Source(task="boolq", track="QA", seed=1, epochs=3),
    Source(task="squad_v1", track="QA", seed=2, epochs=2, dev_rows=200, max_length=256, toy="toy_span"),
    Source(task="scitail", track="NLI", seed=3, epochs=5),
    Source(task="snli", track="NLI", seed=4, epochs=3),
    Source(task="qnli", track="NLI", seed=14, epochs=3),
    Source(task="imdb", track="Sentiment", seed=5, epochs=1, rows=6400, toy="toy_sentiment"),
    Source(task="rotten_tomatoes", track="Sentiment", seed=6, epochs=6, toy="toy_sentiment"),
    Source(task="stsb", track="STS", seed=7, epochs=4, toy="toy_similarity"),
    Source(task="qqp", track="STS", seed=8, epochs=3),
    Source(task="winogrande", track="Comsense", seed=9, epochs=1, toy="toy_choice"),
    Source(task="social_iqa", track="Comsense", seed=10, epochs=5, toy="toy_choice"),
    Source(task="mnli", track="NLI", seed=11, epochs=2),
    Source(task="mrpc", track="STS", seed=12, epochs=4),
    Source(task="sst2", track="Sentiment", seed=13, epochs=2, toy="toy_sentiment"),
)

SOURCES: dict[str, Source] = {source.task: source for source in _ROWS}
"""By task; within a track those that are chosen first come first."""


def sources_of(track: str, target: str, count: int = 2, *, exclude_target: bool = True) -> tuple[str, ...]:
    """Return the names of a track's sources for a target, equally many for every track.

    Args:
        track: one of the five.
        target: the task that the merged adapter is tuned on.
        count: how many.
        exclude_target: False puts a source that is the target first, which shows what leakage is worth.

    Raises:
        UsageError: the track has not so many, or no source that is the target.
    """
    names = [source.task for source in _ROWS if source.track == track and not source.is_target]
    if not exclude_target:
        if target not in SOURCES or SOURCES[target].track != track:
            raise UsageError(f"exclude_target = False: the track {track} has no source that is {target!r}")
        names = [target, *names]
    if len(names) < count:
        raise UsageError(f"count = {count}: the track {track} has {len(names)} sources for {target!r}: {names}")
    return tuple(names[:count])


def train_missing(
    names: Iterable[str],
    folder: Path,
    model: BackboneConfig,
    environment: dict[str, Any],
    say: Console,
    tiny: bool = False,
) -> dict[str, tuple[Path, RunRecord]]:
    """Train what is not in ``folder`` yet, and return each source's AdapterHub folder and record.

    Args:
        names: of the sources.
        folder: of all sources of all backbones.
        model: the backbone.
        environment: of the records.
        say: where to say what was trained.
        tiny: toy tasks.

    Raises:
        UsageError: the data are not there.
    """
    found = {}
    for name in names:
        source = SOURCES[name]
        settings = _identity(source, model, tiny)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        home = folder / f"{name}-{digest}"
        if not (home / "record.json").is_file():
            shutil.rmtree(home, ignore_errors=True)  # of a run that was stopped
            record = _train(source, model, settings, home / "adapter", environment)
            write_record(home / "record.json", record)
            metric = str(record.data["metric"])
            shown = f"{metric} {record.results[metric]:.3f}, trivial {record.results['majority']:.3f}"
            say.print(f"source {name}: {shown}, {record.seconds:.0f} s")
        found[name] = home / "adapter", read_record(home / "record.json")
    return found


def _identity(source: Source, model: BackboneConfig, tiny: bool) -> dict[str, Any]:
    """All that decides an adapter, as plain values."""
    named = model.name is not None
    files = {} if tiny else {task: _files(get_task(task).folder) for task in (source.task, *TARGETS)}
    return {
        "revision": _REVISION,
        "source": asdict(source),
        "bottleneck": 6 if tiny else _BOTTLENECK,
        "backbone": {"dtype": model.dtype, "config": model.config, "files": _encoder(str(model.name)) if named else {}},
        "data": files,
        "tiny": tiny,
    }


def _files(folder: str) -> dict[str, str]:
    return file_digests(data_folder() / folder, "*.parquet")


def _encoder(name: str) -> dict[str, str]:
    folder = Path(name)
    return file_digests(folder, "*.safetensors") | file_digests(folder, "tokenizer.json")


def _train(
    source: Source, model: BackboneConfig, settings: dict[str, Any], folder: Path, environment: dict[str, Any]
) -> RunRecord:
    """Train one source, write its adapter into ``folder``, and return its record."""
    tiny = settings["tiny"]
    task = source.toy if tiny else source.task
    rows, removed = _toy(task) if tiny else _rows(source)
    module = SparseAdapterModule(
        task=task,
        backbone=model,
        adapter=AdapterConfig(kind="pfeiffer", bottleneck=settings["bottleneck"], name=source.task),
        prune=PruneConfig(sparsity=0.0),
        optim=OptimConfig(lr=source.lr),
        max_length=source.max_length,
        seed=source.seed,
    )
    data = TaskDataModule(
        task=task,
        rows=rows,
        batch_size=source.batch_size,
        eval_batch_size=32,
        max_length=source.max_length,
        seed=source.seed,
    )
    recorder, started = Recorder(), time.perf_counter()
    _trainer(1 if tiny else source.epochs, recorder).fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    export_adapter(module, folder, format="adapterhub", head=False)
    _halve(folder / "adapter.safetensors")
    metric = module.task.metrics[0]
    found = {"majority": baseline_scores(module, data, "validation")[metric], "steps": recorder.steps}
    sizes = {"train_rows": len(rows["train"]), "validation_rows": len(rows["validation"]), "removed_rows": removed}
    return RunRecord(
        name=source.task,
        status="finished",
        config={"run": settings},
        data={"task": task, "metric": metric, **sizes},
        model=module.backbone_fingerprint | {"adapter": file_digests(folder, "*")},
        seeds={"module": source.seed, "data": source.seed},
        environment=environment,
        results=recorder.last() | found | {"seconds_per_step": median(recorder.seconds)},
        seconds=seconds,
    )


def _halve(path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def _trainer(epochs: int, recorder: Recorder) -> L.Trainer:
    """A Trainer that validates after the last epoch alone."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[recorder],
    )


def _toy(task: str) -> tuple[dict[str, Any], int]:
    return {split: toy_rows(task, split, 64) for split in ("train", "validation")}, 0


def _rows(source: Source) -> tuple[dict[str, Any], int]:
    """A fixed sample of each split without the texts of the targets, and how many training rows had such."""
    task = get_task(source.task)
    splits = {stage: _read(source.task, task.splits[stage]) for stage in ("train", "validation")}
    texts = frozenset[str]() if source.is_target else _texts_of_targets()
    kept = {stage: _without(split, build_kind(task).required(), texts) for stage, split in splits.items()}
    sizes = {"train": source.rows, "validation": source.dev_rows}
    found = {stage: split.shuffle(seed=0).select(range(min(sizes[stage], len(split)))) for stage, split in kept.items()}
    return found, len(splits["train"]) - len(kept["train"])


def _read(task: str, split: str) -> Dataset:
    # read this way it leaves no copy in the cache of datasets
    return Dataset(pq.read_table(data_folder() / get_task(task).folder / f"{split}.parquet"))


def _without(rows: Dataset, columns: Iterable[str], texts: frozenset[str]) -> Dataset:
    shared = {number for column in columns for number, text in enumerate(rows[column][:]) if _letters(text) in texts}
    return rows.select([number for number in range(len(rows)) if number not in shared])


def _texts_of_targets() -> frozenset[str]:
    """Every text of the targets' training and evaluation rows, but short ones."""
    found = set[str]()
    for name in TARGETS:
        task = get_task(name)
        for stage in ("train", "validation"):
            rows = _read(name, task.splits[stage])
            found.update(_letters(text) for column in task.text for text in rows[column][:])
    return frozenset(text for text in found if len(text) >= _LETTERS)


def _letters(text: Any) -> str:
    """What is left of a text that two files tokenised in different ways."""
    return re.sub(r"[^a-z0-9]+", "", str(text).casefold())
