"""A measured importance as plain values: in a file of its own (``importance.json``), and in a checkpoint's manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.strict import check_fingerprint
from peft_lightning.layers.importance import Importance
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_bytes
from peft_lightning.reading.seal import sealed, unseal

__all__ = ["importance_of", "plain_importance", "read_importance", "write_importance"]

_log = logging.getLogger(__name__)

_FORMAT = 1
_MOST = 1e150  # its square is still a number


def plain_importance(importance: Importance) -> dict[str, Any]:
    """Numbers and lists; fp64 values survive JSON exactly."""
    return {
        "heads": {path: tensor.tolist() for path, tensor in importance.heads.items()},
        "neurons": {path: tensor.tolist() for path, tensor in importance.neurons.items()},
        "blocks": dict(importance.blocks),
        "examples": importance.examples,
        "tokens": importance.tokens,
    }


def importance_of(values: Any, what: str) -> Importance:
    """What :func:`plain_importance` was given.

    Raises:
        CheckpointError: if it is malformed; ``what`` is the file's name.
    """
    names = {field.name for field in fields(Importance)}
    if not isinstance(values, dict) or not names <= values.keys():
        raise CheckpointError(f"{what}: damaged (an importance has {', '.join(sorted(names))})")
    for name in ("examples", "tokens"):
        if type(values[name]) is not int or values[name] < 1:
            raise CheckpointError(f"{what}: damaged ({name} must be a whole number of at least 1)")
    blocks = values["blocks"]
    if not isinstance(blocks, dict) or not all(_is_score(value) for value in blocks.values()):
        raise CheckpointError(f"{what}: damaged (its blocks must be numbers of at least 0)")
    return Importance(
        heads=_tensors(values["heads"], f"{what}: damaged (its heads"),
        neurons=_tensors(values["neurons"], f"{what}: damaged (its neurons"),
        blocks={str(path): float(value) for path, value in blocks.items()},
        examples=values["examples"],
        tokens=values["tokens"],
    )


def write_importance(
    path: str | Path, importance: Importance, backbone: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write a file that :func:`read_importance` reads.

    Args:
        path: the JSON to write.
        importance: what was measured.
        backbone: fingerprint of the backbone.
        settings: how it was measured, for people to read; plain values.
    """
    content = sealed({"format": _FORMAT, "backbone": dict(backbone), **settings, **plain_importance(importance)})
    atomic_write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_importance(path: str | Path, backbone: Mapping[str, Any], task: str) -> Importance:
    """Read an importance, for the backbone that it was measured on.

    Args:
        path: a file of :func:`write_importance`, or a folder with one that is named after the task.
        backbone: fingerprint of the backbone at hand.
        task: name of the task at hand. An importance of another task is read, which rank 0 logs as a warning.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if the file is damaged or belongs to another backbone; says which.
    """
    place = Path(path) / f"{task}.json" if Path(path).is_dir() else Path(path)
    what = f"importance.file = {place}"
    if not place.is_file():
        raise UsageError(f"{what}: there is no such file")
    try:
        content = parse_json(read_bytes(place))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{what}: is no importance of format {_FORMAT}")
    recorded = content.get("backbone")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{what}: damaged (it does not say which backbone it belongs to)")
    check_fingerprint(recorded, backbone, what)
    importance = importance_of(content, what)
    try:
        unseal(content)
    except ValueError as error:
        raise CheckpointError(f"{what}: damaged ({error})") from None
    if content.get("task") not in (None, task):
        measured_on = str(content["task"])[:100]
        rank_zero_only(_log.warning)("%s: was measured on %s, the task here is %s", what, measured_on, task)
    return importance


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MOST


def _tensors(values: Any, what: str) -> dict[str, Tensor]:
    lists = isinstance(values, dict) and all(isinstance(entry, list) for entry in values.values())
    if not lists or not all(_is_score(value) for entry in values.values() for value in entry):
        raise CheckpointError(f"{what} must be lists of numbers of at least 0)")
    return {str(path): torch.tensor(entry, dtype=torch.float64) for path, entry in values.items()}
