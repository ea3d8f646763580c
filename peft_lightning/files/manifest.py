"""What our files say of themselves, and how they are read.

A checkpoint (``.ckpt``) holds tensors and plain containers and is read with ``weights_only=True``, if its SHA-256
(files/checksum) is right. An exported adapter is a folder of ``adapter.safetensors`` and ``manifest.json`` with the
SHA-256 of the former; tensors with masks are packed there (files/packed).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_lightning.atomic import atomic_write_together
from peft_lightning.errors import CheckpointError, first_line
from peft_lightning.files.checksum import verify
from peft_lightning.files.packed import pack, unpack
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_bytes
from peft_lightning.reading.pickled import read_pickled
from peft_lightning.reading.seal import sealed, unseal

__all__ = ["FORMAT", "MANIFEST_KEY", "read_file", "write_adapter"]

MANIFEST_KEY = "peft_lightning"
FORMAT = 2


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or an exported adapter's folder.

    Args:
        path: a ``.ckpt`` file, an adapter folder, or a run's folder (its ``best.ckpt``, else its ``last.ckpt``).

    Returns:
        A mapping with at least ``state_dict`` and our manifest under :data:`MANIFEST_KEY`.

    Raises:
        CheckpointError: if there is no such file, or it is damaged or not one of ours.
    """
    path = Path(path)
    if path.is_dir() and not (path / "manifest.json").exists():
        found = [path / name for name in ("best.ckpt", "last.ckpt") if (path / name).exists()]
        if not found:
            raise CheckpointError(f"{path}: this folder holds no best.ckpt, last.ckpt or manifest.json")
        path = found[0]
    if not path.exists():
        beside = path.with_name("last.ckpt")
        hint = f"; there is {beside}" if beside.exists() else ""
        raise CheckpointError(f"{path}: there is no such checkpoint{hint}")
    content = _read_adapter(path) if path.is_dir() else _read_checkpoint(path)
    manifest = content.get(MANIFEST_KEY)
    if not isinstance(manifest, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path}: was not written by peft_lightning (it has no manifest)")
    if type(manifest.get("format")) is not int or manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {repr(manifest.get('format'))[:100]} is not the format {FORMAT} that is read here; "
            "use the version of peft_lightning that wrote it, or train again"
        )
    for key, kind in (("class", str), ("hyper_parameters", dict)):
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: damaged (its manifest has no {key})")
    return content


def _read_checkpoint(path: Path) -> dict[str, Any]:
    verify(path)
    try:
        content = read_pickled(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, truncated or not a checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint (it holds a {type(content).__name__})")
    return content


def _read_adapter(folder: Path) -> dict[str, Any]:
    tensors = folder / "adapter.safetensors"
    try:
        manifest = parse_json(read_bytes(folder / "manifest.json"))
        if not isinstance(manifest, dict):
            raise ValueError("manifest.json holds no mapping")
        unseal(manifest)
        payload = read_bytes(tensors)
        if hashlib.sha256(payload).hexdigest() != manifest.get("sha256"):
            raise ValueError("the SHA-256 of adapter.safetensors differs from the manifest's")
        return {"state_dict": unpack(payload), MANIFEST_KEY: manifest}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: damaged or incomplete adapter ({error})") from error


def write_adapter(folder: str | Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write an adapter's folder; the manifest's SHA-256 keeps a half-replaced one from being read.

    Args:
        folder: made if needed; an adapter in it is replaced, and stays if the disk refuses.
        tensors: what the method trained, and its masks (``X_mask`` beside ``X``), which are packed.
        manifest: JSON-able description; ``sha256`` is added.
    """
    payload = pack(tensors)
    described = sealed({**manifest, "sha256": hashlib.sha256(payload).hexdigest()})
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"
    atomic_write_together(folder, {"adapter.safetensors": payload, "manifest.json": text.encode()})
