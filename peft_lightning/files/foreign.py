"""Adapters of other libraries as plain values, and what reading any of their folders needs.

Foreign formats have no place for masks: there a removed weight is a zero, and the masks lie beside the adapter in a
file of our own, ``peft_lightning_masks.safetensors`` (packed bits), which other libraries pass over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_lightning.atomic import atomic_write_together
from peft_lightning.errors import CheckpointError, UsageError, first_line
from peft_lightning.files.packed import MASK, pack, read_record, unpack
from peft_lightning.layers.adapters import AdapterConfig
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_bytes, read_safetensors
from peft_lightning.reading.pickled import read_pickled

__all__ = ["ForeignAdapter", "read_json", "read_masks", "read_tensors", "write_folder"]

_MASKS = "peft_lightning_masks.safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ForeignAdapter:
    """An adapter outside any module; both directions go through it.

    Attributes:
        adapter: kind, shape and place.
        tensors: fp32, named as inside the bare backbone (``encoder.layer.0.output.adapters.NAME.adapter_up.weight``).
        masks: name of a tensor -> its bool mask, True = kept.
        prune: how the masks were made, the settings as plain values; empty where nothing says it.
        head: the classification head's fp32 tensors under our names (``out.weight``, with ``dense.weight`` before it
            where it has two layers), or None.
        labels: the head's classes in order, or None where the file does not say.
        base: what is known of the base model: model_type, hidden_size, num_hidden_layers, and model_name.
        rule: which modules the file says it changes, in the words of its format.
        notes: settings that a reader did not take over, one line each.
        origin: where it comes from, plain values; only ``read_source`` fills it in.
    """

    adapter: AdapterConfig
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    prune: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Tensor] | None = None
    labels: tuple[str, ...] | None = None
    base: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        CheckpointError: if there is no such file, or it holds something else.
    """
    try:
        content = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no mapping")
    return content


def read_tensors(folder: Path, safe: str, pickled: str, allow_bin: bool) -> dict[str, Tensor]:
    """Tensors of a foreign file in fp32; the safetensors file goes before the pickled one.

    Args:
        folder: where the files are.
        safe: name of the safetensors file.
        pickled: name of the ``.bin`` file that older versions wrote.
        allow_bin: whether the latter may be read; only tensors and plain containers are, in any case.

    Raises:
        CheckpointError: if neither is there, or it is damaged or holds something else.
        UsageError: if only the pickled one is there and not allowed.
    """
    path = folder / safe
    if not path.exists() and (folder / pickled).exists():
        path = folder / pickled
        if not allow_bin:
            raise UsageError(
                f"{path}: is a pickle, which import and merge read with --allow_bin, and write as safetensors"
            )
    try:
        if path.name == safe:
            content: Any = read_safetensors(path)
        else:
            content = read_pickled(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds neither {safe} nor {pickled}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not readable ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name!r} is {what}; must be a tensor of float32, float16 or bfloat16")
    return {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in content.items()}


def read_masks(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The masks beside a foreign adapter and how they were made.

    Args:
        folder: where the file of the masks is, if there is one.
        tensors: the adapter's, by their names inside the bare backbone.

    Returns:
        Masks by the tensors' names, and the settings that made them; both empty where there is no file, and the latter
        where it does not say.

    Raises:
        CheckpointError: if the file is damaged or removes everything, or the tensors have changed since.
    """
    path = folder / _MASKS
    if not path.exists():
        return {}, {}
    try:
        payload = read_bytes(path)
        masks = unpack(payload)
        record = read_record(payload)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    found = {}
    for key, mask in masks.items():
        name = key.removesuffix(MASK)
        tensor = tensors.get(name)
        if name == key or mask.dtype != torch.bool or tensor is None or tensor.shape != mask.shape:
            raise CheckpointError(f"{path}: {key} is the mask of no tensor in this folder")
        if bool((tensor[~mask] != 0).any()):
            raise CheckpointError(
                f"{path}: {name} has values where its mask removed them, so it was trained without the mask; "
                "delete this file to import the adapter without masks"
            )
        found[name] = mask
    if found and not any(bool(mask.any()) for mask in found.values()):
        raise CheckpointError(f"{path}: removes every weight of the adapter")
    return found, record


def write_folder(
    folder: Path,
    files: Mapping[str, Mapping[str, Any] | bytes],
    masks: Mapping[str, Tensor],
    prune: Mapping[str, Any],
) -> None:
    """Write a foreign adapter's files, and the masks beside them.

    Args:
        folder: made if needed.
        files: file name -> its content; a mapping is written as JSON.
        masks: bool masks by the tensors' names inside the bare backbone; no file is written where there are none.
        prune: how they were made, written into the same file.
    """
    contents = {
        name: content if isinstance(content, bytes) else (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
        for name, content in files.items()
    }
    if masks:
        contents[_MASKS] = pack({name + MASK: mask for name, mask in masks.items()}, prune)
    atomic_write_together(folder, contents)
