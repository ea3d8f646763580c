"""Small grids for the tests of studies: a generated task, a tiny random backbone in a folder or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.seeding import seeded_on_cpu
from peft_lightning.study.grid import merged_settings
from tests.toy import tiny

SPARSE: dict[str, Any] = {
    "class_path": "SparseAdapterModule",
    "init_args": {
        "adapter": {"kind": "pfeiffer", "bottleneck": 8, "init_std": 0.1},
        "prune": {"sparsity": 0.0},
        "head_dropout": 0.0,
    },
}
FULL: dict[str, Any] = {
    "class_path": "FineTuneModule",
    "init_args": {"head_dropout": 0.0, "backbone": {"dtype": "float32"}},
}


def folder(path: Path, **changes: Any) -> str:
    """A folder with a tiny encoder of three layers without dropout."""
    config = BackboneConfig(config={**tiny(0.0)["config"], "num_hidden_layers": 3, **changes}, tokenizer="toy")
    with seeded_on_cpu(0):
        model: Any = build_backbone(config)
    model.save_pretrained(path)
    return str(path)


def grid_of(backbone: str, methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A grid of few cells: what a YAML file would hold."""
    grid: dict[str, Any] = {
        "backbone": {"name": backbone, "tokenizer": "toy"},
        "data": {"shots": [10], "test_rows": 100, "batch_size": 8, "max_length": 16},
        "tasks": ["toy_sentiment"],
        "seeds": [13, 21],
        "lr": [5e-3],
        "epochs": [10],
        "methods": methods,
        "device": "cpu",
    }
    return merged_settings(grid, changes)
