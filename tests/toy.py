"""Small modules and data for the tests: a generated task and a tiny random backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

import peft_lightning.methods as methods
from peft_lightning import RunCheckpoint, TaskDataModule
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.module import MethodModule

METHODS: list[type[MethodModule]] = [getattr(methods, name) for name in methods.__all__]
# A frozen random backbone needs larger steps through its adapters than a trained one takes itself.
LEARNING_RATE = {"FineTuneModule": 1e-3}

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


def build(method: type[Any], *, backbone: Any = None, dropout: float = 0.1, **options: Any) -> Any:
    """A module of ``method`` on the toy task."""
    options.setdefault("task", "toy_sentiment")
    options.setdefault("optim", {"lr": LEARNING_RATE.get(method.__name__, 5e-3)})
    options.setdefault("head_dropout", dropout)
    return method(backbone=backbone or tiny(dropout), **options)


def data(batch_size: int = 16, task: Any = "toy_sentiment", **options: Any) -> TaskDataModule:
    """The toy task's data."""
    return TaskDataModule(task=task, tokenizer="toy", batch_size=batch_size, **options)


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
