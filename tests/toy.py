"""Small modules and data for the tests: a generated task and a tiny random backbone."""

from __future__ import annotations

import atexit
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch

import peft_lightning.methods as methods
from peft_lightning import MLMDataModule, RunCheckpoint, TaskDataModule
from peft_lightning.atomic import fresh_folder
from peft_lightning.backbones.toy import TOY_WORDS
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.files.manifest import write_adapter
from peft_lightning.module import MethodModule
from peft_lightning.pretrain_module import PretrainModule
from peft_lightning.task_module import TaskModule

METHODS: list[type[MethodModule]] = [getattr(methods, name) for name in methods.__all__]
TASK_METHODS = [method for method in METHODS if issubclass(method, TaskModule)]
TASK_OPTIONS = ("task", "head_dropout", "class_weights", "max_length", "head")
# A frozen random backbone needs larger steps through its adapters than a trained one takes itself.
LEARNING_RATE = {"FineTuneModule": 1e-3}
# What sources are like unless a test says otherwise.
SOURCE: dict[str, Any] = {"kind": "houlsby", "bottleneck": 16, "init_std": 0.1}

TINY: dict[str, Any] = {
    "config": {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    },
    "tokenizer": "toy",
}


def tiny(dropout: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A backbone setting: tiny, random, with the given dropout everywhere."""
    config = {**TINY["config"], "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return {**TINY, "config": config, **changes}


def build(method: Any, *, backbone: Any = None, dropout: float = 0.1, **options: Any) -> Any:
    """A module of ``method`` on the toy task, or on the toy language."""
    if issubclass(method, PretrainModule):
        options = {name: value for name, value in options.items() if name not in TASK_OPTIONS}
        options.setdefault("optim", {"lr": 2e-3})
        if "drop" in inspect.signature(method).parameters:
            options.setdefault("drop", {"interval": 3})
        setting: Any = deep(backbone or tiny(dropout))
        return method(backbone=setting, **options)
    options.setdefault("task", "toy_sentiment")
    options.setdefault("optim", {"lr": LEARNING_RATE.get(method.__name__, 5e-3)})
    options.setdefault("head_dropout", dropout)
    backbone = backbone or tiny(dropout)
    if "sources" in inspect.signature(method).parameters:
        options.setdefault("sources", toy_sources(backbone, seed=options.get("seed", 42)))
    return method(backbone=backbone, **options)


def toy_sources(backbone: Any, *adapters: dict[str, Any], seed: int = 42, keep: float = 1.0) -> list[str]:
    """Folders of random adapters on a random backbone, the same ones each time.

    Args:
        backbone: its setting.
        adapters: what differs from ``SOURCE``; two alike by default.
        seed: that the backbone's weights were drawn with.
        keep: share of the weights that masks keep; without masks if it is 1.
    """
    content = json.dumps([backbone, [{**SOURCE, **adapter} for adapter in adapters or ({}, {})], seed, keep])
    folder = _source_home() / hashlib.sha256(content.encode()).hexdigest()[:16]
    if not folder.exists():
        _write_sources(folder, *json.loads(content))
    return [str(path) for path in sorted(folder.iterdir())]


@lru_cache
def _source_home() -> Path:
    """A folder that processes started by this one know too: a run that goes on must name the same sources."""
    if "TOY_SOURCES" not in os.environ:
        os.environ["TOY_SOURCES"] = tempfile.mkdtemp(prefix="toy_sources_")
        atexit.register(shutil.rmtree, os.environ["TOY_SOURCES"], True)
    return Path(os.environ["TOY_SOURCES"])


def _write_sources(folder: Path, backbone: Any, adapters: list[dict[str, Any]], seed: int, keep: float) -> None:
    with fresh_folder(folder) as fresh:
        for number, adapter in enumerate(adapters):
            prune: Any = {"sparsity": 1 - keep, "score": "magnitude"}
            module: Any = methods.SparseAdapterModule(
                task="toy_sentiment", backbone=backbone, adapter=cast(Any, adapter), prune=prune, seed=seed
            )
            module.configure_model()
            rng = torch.Generator().manual_seed(number)
            for parameter in (parameter for part in module.adapters.values() for parameter in part.parameters()):
                parameter.data.normal_(std=adapter["init_std"], generator=rng)
            if keep < 1:
                module.install_masks(())
            write_adapter(fresh / f"source{number}", module.owned_state(), module.manifest())


def deep(backbone: dict[str, Any]) -> dict[str, Any]:
    """A backbone setting to train from scratch, with as many layers as token dropping needs."""
    return {**backbone, "config": {**backbone["config"], "num_hidden_layers": 4, "initializer_range": 0.02}}


def data(batch_size: int = 16, task: Any = "toy_sentiment", *, method: type[Any] | None = None, **options: Any) -> Any:
    """The toy task's data, or blocks of the toy language for a method that pretrains."""
    if method is None or not issubclass(method, PretrainModule):
        return TaskDataModule(task=task, tokenizer="toy", batch_size=batch_size, **options)
    rows = options.pop("rows", None)
    sizes = {split: len(rows[split]) for split in rows} if rows else {"train": 256, "validation": 32, "test": 32}
    return MLMDataModule(
        inputs=str(toy_corpus(tuple(sizes.items()))), tokenizer="toy", block_size=16, batch_size=batch_size, **options
    )


@lru_cache
def toy_corpus(sizes: tuple[tuple[str, int], ...], shuffled: bool = False) -> Path:
    """A folder of texts, so many blocks of 16 tokens a split.

    The words of a text go round in one of five circles, so that a masked word follows from its neighbours; shuffled,
    nothing follows.
    """
    words = [word for group in TOY_WORDS.values() for word in group][:30]
    folder = Path(tempfile.mkdtemp(prefix="toy_corpus_"))
    atexit.register(shutil.rmtree, folder, True)
    rng = np.random.default_rng(0)
    for split, blocks in sizes:
        texts = []
        for _ in range(blocks):
            circle, start = rng.integers(5), rng.integers(6)
            text = [words[6 * circle + (start + i) % 6] for i in range(14)]  # with [CLS] and [SEP] a block
            texts.append(" ".join(rng.choice(words, 14) if shuffled else text))
        (folder / f"{split}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def trainer(folder: Path | None = None, every_n_steps: int = 3, **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU; with a folder it keeps checkpoints and metrics.csv there."""
    callbacks = options.pop("callbacks", [])
    if folder is not None:
        callbacks = [*callbacks, RunCheckpoint(folder, every_n_steps)]
        options.setdefault("logger", MetricsCSV(folder))
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": folder is not None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
    }
    return L.Trainer(**{**settings, **options})
