"""Masked tensors on the disk: kept values only, and masks of one bit per weight.

A safetensors file with an entry of 100 bytes per tensor would cost more than the masks themselves, so the packed form
has one tensor per dtype, ``values.<dtype>``, with the kept values of all tensors one after another, and ``bits``
(uint8, first entry in the highest bit) with all bool tensors. The index is compact JSON in the file's own metadata,
under the file's checksum: it groups the names that differ in their layer number only::

    {"names": [before, after], "layers": [[start, stop], ...], "shape": [...], "dtype": "float32", "masked": true}

A group without ``layers`` is one name, ``names`` holding it alone. ``masked`` means that only the entries where the
bool tensor ``<name>_mask`` is True are stored; the others are zeros. A file
of masks may say how they were made: its index is then ``{"tensors": [groups], "record": {...}, "sha256": "..."}``, with
the SHA-256 of the others and of what is stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_safetensors

__all__ = ["MASK", "pack", "read_record", "unpack"]

MASK = "_mask"
"""What the name of a tensor's mask adds to the tensor's."""

_KEY = "peft_lightning_packed"
_LAYER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")
# Far above any model; keeps a lying index from filling the memory with names.
_MOST_TENSORS = 200_000
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8)
}


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: str
    masked: bool

    @property
    def size(self) -> int:
        return prod(self.shape)


def pack(state: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> bytes:
    """Serialise tensors; those with masks packed, and plainly named where none has a mask.

    Args:
        state: name -> tensor; the mask of a tensor ``X`` is the bool tensor ``X_mask`` of its shape. A tensor with a
            value other than zero where its mask is False is stored whole, so nothing is ever lost. (Of a removed
            weight only the sign of its zero is.)
        record: plain values to keep in the index, where there are masks, with the SHA-256 of all of it;
            :func:`read_record` reads them. None: neither is kept.

    Returns:
        The content of a safetensors file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if not any(tensor.dtype == torch.bool for tensor in tensors.values()):
        return save_safetensors(tensors)
    entries = [
        _Entry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), _is_masked(name, tensors))
        for name, tensor in tensors.items()
    ]
    groups = _group(entries)
    pieces: dict[str, list[Tensor]] = {}
    for entry in _expand(groups):
        flat = tensors[entry.name].reshape(-1)
        if entry.masked:
            flat = flat[tensors[entry.name + MASK].reshape(-1)]
        pieces.setdefault(entry.dtype, []).append(flat)
    bits = torch.cat(pieces.pop("bool"))
    stored = {f"values.{dtype}": torch.cat(parts) for dtype, parts in pieces.items()}
    stored["bits"] = torch.from_numpy(np.packbits(bits.numpy()))
    # One entry, for the order of several is random in the file.
    index: Any = groups
    if record is not None:
        index = {"tensors": groups, "record": json.loads(json.dumps(dict(sorted(record.items()))))}
        index["sha256"] = _digest(index, stored)
    return save_safetensors(stored, metadata={_KEY: json.dumps(index, separators=(",", ":"))})


def unpack(payload: bytes) -> dict[str, Tensor]:
    """The tensors that :func:`pack` was given.

    Raises:
        ValueError: if the content is no safetensors file, or its index is malformed or does not agree with what is
            stored.
    """
    stored = read_safetensors(payload)
    index = _metadata(payload).get(_KEY)
    if index is None:
        return stored
    entries = list(_expand(_checked(index, stored)))
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) != len(entries):
        raise ValueError("the index names a tensor twice")
    state = _masks(stored.pop("bits", None), [entry for entry in entries if entry.dtype == "bool"])
    for dtype in sorted({entry.dtype for entry in entries} - {"bool"}):
        values = stored.pop(f"values.{dtype}", None)
        state |= _values(values, [entry for entry in entries if entry.dtype == dtype], state)
    if stored:
        raise ValueError(f"the index does not speak of {', '.join(sorted(stored))}")
    return {name: state[name] for name in by_name}


def read_record(payload: bytes) -> dict[str, Any]:
    """The record that :func:`pack` was given, empty where there was none; :func:`unpack` must have read the file.

    Raises:
        ValueError: if the record is no mapping.
    """
    index = _metadata(payload).get(_KEY)
    content = parse_json(index) if index is not None else []
    record = content.get("record", {}) if isinstance(content, dict) else {}
    if not isinstance(record, dict):
        raise ValueError("the index has a record that is no mapping")
    return record


def _digest(index: Mapping[str, Any], stored: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode())
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_masked(name: str, tensors: Mapping[str, Tensor]) -> bool:
    tensor, mask = tensors[name], tensors.get(name + MASK)
    if mask is None or mask.dtype != torch.bool or tensor.dtype == torch.bool or mask.shape != tensor.shape:
        return False
    return not bool((tensor[~mask] != 0).any())


# -- the index ------------------------------------------------------------------------------------------------------


def _group(entries: list[_Entry]) -> list[dict[str, Any]]:
    """Groups in order of first appearance; within a group by layer number."""
    layers: dict[tuple[Any, ...], list[int]] = {}
    for entry in entries:
        found = _LAYER.search(entry.name)
        names = (entry.name[: found.start()], entry.name[found.end() :]) if found else (entry.name,)
        numbers = layers.setdefault((names, entry.shape, entry.dtype, entry.masked), [])
        if found:
            numbers.append(int(found.group()))
    groups: list[dict[str, Any]] = []
    for (names, shape, dtype, masked), numbers in layers.items():
        group: dict[str, Any] = {"names": list(names), "shape": list(shape), "dtype": dtype}
        if numbers:
            group["layers"] = _ranges(sorted(numbers))
        if masked:
            group["masked"] = True
        groups.append(group)
    return groups


def _ranges(numbers: list[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges


def _expand(groups: list[dict[str, Any]]) -> Iterator[_Entry]:
    for group in groups:
        names, shape = group["names"], tuple(group["shape"])
        if "layers" in group:
            full = [f"{names[0]}{i}{names[1]}" for start, stop in group["layers"] for i in range(start, stop)]
        else:
            full = names
        for name in full:
            yield _Entry(name, shape, group["dtype"], group.get("masked", False))


def _checked(text: str, stored: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Parse an index; every field has its type, and it names a bounded number of tensors."""
    groups = parse_json(text)
    if isinstance(groups, dict) and groups.keys() <= {"tensors", "record", "sha256"}:
        if groups.pop("sha256", None) not in (None, _digest(groups, stored)):
            raise ValueError("the SHA-256 in the index is not that of what is stored")
        groups = groups.get("tensors")
    if not isinstance(groups, list):
        raise ValueError("the index is no list")
    count = 0
    for group in groups:
        if not isinstance(group, dict) or not _well_formed(group):
            raise ValueError(f"the index has a malformed entry: {str(group)[:200]}")
        count += sum(stop - start for start, stop in group.get("layers", [(0, 1)]))
        if count > _MOST_TENSORS:
            raise ValueError(f"the index names more than {_MOST_TENSORS} tensors")
    return groups


def _well_formed(group: dict[str, Any]) -> bool:
    names, layers, shape = group.get("names"), group.get("layers"), group.get("shape")
    return (
        _listed(names, str, 1 if layers is None else 2)
        and _listed(shape, int)
        and all(size >= 0 for size in shape or [])
        and (layers is None or (isinstance(layers, list) and all(_is_range(pair) for pair in layers)))
        and group.get("dtype") in _DTYPES
        and isinstance(group.get("masked", False), bool)
        and not (group.get("masked", False) and group["dtype"] == "bool")
        and group.keys() <= {"names", "layers", "shape", "dtype", "masked"}
    )


def _listed(value: Any, kind: type, length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and all(type(entry) is kind for entry in value)
        and (length is None or len(value) == length)
        and len(value) <= 16
    )


def _is_range(pair: Any) -> bool:
    return _listed(pair, int, 2) and 0 <= pair[0] < pair[1] <= 1_000_000


def _metadata(payload: bytes) -> dict[str, Any]:
    """The file's own metadata; the layout has been checked by whoever loaded the tensors."""
    header = parse_json(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    found = header.get("__metadata__") or {}
    return found if isinstance(found, dict) else {}


# -- what is stored -------------------------------------------------------------------------------------------------


def _masks(stored: Tensor | None, entries: list[_Entry]) -> dict[str, Tensor]:
    total = sum(entry.size for entry in entries)
    if stored is None or stored.dtype != torch.uint8 or tuple(stored.shape) != ((total + 7) // 8,):
        raise ValueError(f"the index speaks of {total} mask bits, stored are {_described(stored)}")
    bits = torch.from_numpy(np.unpackbits(stored.numpy(), count=total).astype(bool))
    parts = bits.split([entry.size for entry in entries])
    return {entry.name: part.reshape(entry.shape).clone() for entry, part in zip(entries, parts, strict=True)}


def _values(stored: Tensor | None, entries: list[_Entry], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sizes = [_stored_size(entry, masks) for entry in entries]
    dtype = _DTYPES[entries[0].dtype]
    if stored is None or stored.dtype != dtype or tuple(stored.shape) != (sum(sizes),):
        raise ValueError(f"the index speaks of {sum(sizes)} values of {dtype}, stored are {_described(stored)}")
    state = {}
    for entry, part in zip(entries, stored.split(sizes), strict=True):
        if entry.masked:
            whole = torch.zeros(entry.size, dtype=dtype)
            whole[masks[entry.name + MASK].reshape(-1)] = part
            state[entry.name] = whole.reshape(entry.shape)
        else:
            state[entry.name] = part.reshape(entry.shape).clone()
    return state


def _stored_size(entry: _Entry, masks: Mapping[str, Tensor]) -> int:
    if not entry.masked:
        return entry.size
    mask = masks.get(entry.name + MASK)
    if mask is None or tuple(mask.shape) != entry.shape:
        raise ValueError(f"{entry.name} has no mask of its shape")
    return int(mask.sum())


def _described(stored: Tensor | None) -> str:
    return "none" if stored is None else f"{tuple(stored.shape)} of {stored.dtype}"
