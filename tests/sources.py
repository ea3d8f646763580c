"""Adapters on disk that tests merge: a small backbone's folder, modules on it, and folders of every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_lightning import SparseAdapterModule
from peft_lightning.exchange import export_adapter
from tests.analysis.test_encoder import folder
from tests.toy import build

INPUTS = {"input_ids": torch.arange(4, 16).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


def backbone_folder(path: Path, kind: str = "bert", **options: Any) -> str:
    """A folder with a small random model and the toy tokenizer."""
    return folder(path, kind, **{"initializer_range": 0.2, **options})


def module(backbone: str, number: int, *, task: Any = "toy_sentiment", prune: Any = None, **adapter: Any) -> Any:
    """An adapter of random values, biases too; with ``prune`` also masks."""
    made: Any = build(
        SparseAdapterModule,
        task=task,
        backbone=backbone,
        adapter={"kind": "pfeiffer", "bottleneck": 6, **adapter},
        prune=prune or {"sparsity": 0.0},
        seed=number,
        max_length=16,
    )
    made.configure_model()
    generator = torch.Generator().manual_seed(100 + number)
    for parameter in made.trainable_parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    if prune:
        made.install_masks(())
    return made.eval()


def written(path: Path, given: Any, format: str = "adapterhub", **options: Any) -> Path:
    """A folder with the module's adapter."""
    export_adapter(given, path, format=format, **({"head": False} if format == "peft" else {}), **options)
    return path


def hidden(given: Any) -> torch.Tensor:
    """What a module's or a model's backbone makes of a few tokens."""
    model = getattr(given, "backbone", given)
    with torch.no_grad():
        states: torch.Tensor = model(**INPUTS).last_hidden_state
    return states
