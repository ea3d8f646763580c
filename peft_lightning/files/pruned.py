"""``pruned.json``: what lies beside a pruned model, so that its tensors find places of their shape again.

transformers builds a model by its configuration alone, which has no words for layers of unequal width. This file says
which units are left, and is applied before any tensor is loaded. It lies in three kinds of folders: a whole model with
LoRA folded in (``model``), LoRA alone in PEFT's format, for the pruned backbone (``adapter``), and ``onnx``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_lightning.atomic import atomic_write
from peft_lightning.backbones.options import PRUNED_FILE
from peft_lightning.errors import CheckpointError, first_line
from peft_lightning.files.foreign import read_json
from peft_lightning.layers.plan import PrunePlan
from peft_lightning.reading.limits import file_inside, regular_size
from peft_lightning.reading.seal import sealed, unseal

__all__ = ["PrunedRecord", "check_digests", "read_pruned", "write_pruned"]

_FORMAT, _MOST_OUTPUTS = 1, 1_000_000
# What a folder of each kind cannot be without.
_TENSORS = {"model": ("model.safetensors", "config.json"), "adapter": (), "onnx": ("model.onnx",)}
_TYPES: dict[str, type] = {"model_class": str, "outputs": int, "labels": list, "backbone": dict, "source": dict}
_SOURCE: dict[str, tuple[type, ...]] = {
    "name": (str, type(None)),
    "folder": (bool,),
    "config": (dict, type(None)),
    "revision": (str, type(None)),
    "dtype": (str,),
    "seed": (int,),
}


@dataclass(frozen=True, kw_only=True)
class PrunedRecord:
    """What the file says.

    Attributes:
        kind: model, adapter or onnx.
        model_class: class of transformers that the folder's tensors belong to.
        plan: what is left of the backbone.
        outputs: number of the head's outputs.
        labels: the classes in the order of the outputs; empty where the task has none.
        backbone: fingerprint of the whole backbone.
        source: where the backbone came from: settings of ``BackboneConfig``, ``seed``, and ``folder``: whether the name
            is that of a folder, whose place is not told.
        sha256: name of a file beside -> its digest.
    """

    kind: str
    model_class: str
    plan: PrunePlan
    outputs: int
    labels: tuple[str, ...]
    backbone: Mapping[str, Any]
    source: Mapping[str, Any]
    sha256: Mapping[str, str] = field(default_factory=dict)


def write_pruned(folder: Path, record: PrunedRecord, files: Iterable[str] = ()) -> None:
    """Write the record, with the digests of files that are in the folder already.

    Args:
        folder: where.
        record: what to say; its ``sha256`` is replaced.
        files: names of the files.
    """
    digests = {name: _digest(folder / name) for name in files}
    content = sealed({"format": _FORMAT, **asdict(record), "plan": record.plan.plain(), "sha256": digests})
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    atomic_write(folder / PRUNED_FILE, lambda file: file.write(text.encode()))


def read_pruned(folder: Path) -> PrunedRecord:
    """Read the record; its plan is well-formed, and fits a backbone or not.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    path = folder / PRUNED_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not path.exists():
        raise CheckpointError(f"{folder}: holds no {PRUNED_FILE}, as export writes it for a pruned model")
    content = read_json(path)
    if content.get("format") != _FORMAT:
        found = str(content.get("format"))[:100]
        raise CheckpointError(f"{path}: format {found} is not the format {_FORMAT} that is read here")
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in _TENSORS:
        raise CheckpointError(f"{path}: damaged (kind = {str(kind)[:100]}: must be one of {', '.join(_TENSORS)})")
    for key, wanted in _TYPES.items():
        if type(content.get(key)) is not wanted:
            raise CheckpointError(f"{path}: damaged ({key} must be of type {wanted.__name__})")
    if not 1 <= content["outputs"] <= _MOST_OUTPUTS:
        raise CheckpointError(f"{path}: damaged (outputs must be from 1 to {_MOST_OUTPUTS})")
    if not content["backbone"]:
        raise CheckpointError(f"{path}: damaged (it does not say which backbone it belongs to)")
    source = content["source"]
    if source.keys() != _SOURCE.keys() or not all(type(source[key]) in kinds for key, kinds in _SOURCE.items()):
        raise CheckpointError(f"{path}: damaged (source must say {', '.join(_SOURCE)})")
    digests = content.get("sha256")
    if not isinstance(digests, dict) or not all(_is_digest(name, value) for name, value in digests.items()):
        raise CheckpointError(f"{path}: damaged (sha256 must give each file's digest)")
    if lacking := [name for name in _TENSORS[kind] if name not in digests]:
        raise CheckpointError(f"{path}: damaged (it has no digest of {lacking[0]})")
    plan = PrunePlan.of(content.get("plan"), str(path))
    try:
        unseal(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    return PrunedRecord(
        kind=kind,
        plan=plan,
        labels=tuple(str(label) for label in content["labels"]),
        sha256=digests,
        **{key: content[key] for key in ("model_class", "outputs", "backbone", "source")},
    )


def check_digests(folder: Path, record: PrunedRecord) -> None:
    """Compare the files with what was written.

    Raises:
        CheckpointError: if one is missing, damaged or another one.
    """
    for name, digest in record.sha256.items():
        try:
            found = _digest(file_inside(folder, name))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name}: missing or not readable ({first_line(error)})") from None
        if found != digest:
            raise CheckpointError(f"{folder / name}: damaged or replaced (its SHA-256 is not that of {PRUNED_FILE})")


def _digest(path: Path) -> str:
    regular_size(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_digest(name: str, value: Any) -> bool:
    """A file in the folder itself, and text."""
    return isinstance(value, str) and Path(name).name == name
