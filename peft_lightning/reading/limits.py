"""What is read of a file that someone else made, and how much: sizes are checked before memory is taken.

A few bytes can promise terabytes: a header of tensors, lists in lists, numbers of a billion digits, names for names in
YAML. Each function here looks at the bytes first, in a time that goes with their number, and then reads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from peft_lightning.reading.json_text import parse_json

__all__ = ["file_inside", "read_bytes", "read_safetensors", "regular_size"]

_MOST_HEADER = 1 << 25
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}


def regular_size(path: Path) -> int:
    """Bytes of an ordinary file. A pipe or a device would keep whoever opens it waiting, or never end.

    Raises:
        OSError: there is none, or it is something else.
    """
    about = os.stat(path)
    if stat.S_ISDIR(about.st_mode):
        raise OSError("is a folder, not a file")
    if not stat.S_ISREG(about.st_mode):
        raise OSError("is no ordinary file")
    return about.st_size


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of an ordinary file.

    Args:
        path: of the file.
        most: bytes that it may have; by default what this machine's memory holds.

    Raises:
        OSError: there is none, or it is something else.
        ValueError: it is too large.
    """
    size, allowed = regular_size(path), _memory() if most is None else most
    if size > allowed:
        raise ValueError(f"has {size:,} bytes; allowed: {allowed:,}")
    return path.read_bytes()


def read_safetensors(content: bytes | Path) -> dict[str, Tensor]:
    """Tensors by name, from the content of a file of safetensors or from the file.

    Raises:
        OSError: there is no such file.
        ValueError: the content is none, or its header promises other sizes than it has.
    """
    payload = content if isinstance(content, bytes) else read_bytes(content)
    _check_header(payload)
    try:
        return load_safetensors(payload)
    except (SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"is no file of safetensors ({error})") from None


def _check_header(payload: bytes) -> None:
    """The header lies within the file, and the tensors that it promises are as long as what follows it."""
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > min(len(payload) - 8, _MOST_HEADER):
        raise ValueError(f"is no file of safetensors (a header of {length:,} bytes in a file of {len(payload):,})")
    header = parse_json(payload[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("is no file of safetensors (its header is no mapping)")
    promised = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        promised += _bytes(name, entry)
    if promised != len(payload) - 8 - length:
        raise ValueError(f"its header promises {promised:,} bytes of tensors; it has {len(payload) - 8 - length:,}")


def _bytes(name: str, entry: Any) -> int:
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    bits = _BITS.get(str(entry.get("dtype"))) if isinstance(entry, Mapping) else None
    if bits is None or not isinstance(shape, list) or len(shape) > 64:
        raise ValueError(f"is no file of safetensors ({name[:100]!r} has no dtype or no shape that is known here)")
    size = bits // 8
    for extent in shape:
        if type(extent) is not int or not 0 <= extent < 1 << 62:
            raise ValueError(f"is no file of safetensors ({name[:100]!r} has the shape {str(shape)[:100]})")
        size *= extent
    return size


def file_inside(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names; it lies in the manifest's folder.

    A link may lead to where the hub's cache keeps the content of the folder's files, and nowhere else outside.

    Raises:
        ValueError: the name leads out of the folder.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\x00" not in name
    if not plain or "\\" in name:
        raise ValueError(f"{str(name)[:100]!r} is no name of a file in the same folder")
    path, home = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    kept = home.parents[1] / "blobs" if len(home.parents) > 1 and home.parent.name == "snapshots" else home
    if real.parent not in (home, kept):
        raise ValueError(f"{name!r} is a link that leads out of the folder")
    return path


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
