"""Pickles (``.ckpt``, and ``.bin`` on request): tensors and plain containers, seen through before they are unpickled.

``torch.load(weights_only=True)`` calls nothing but some functions of torch, yet it takes whatever memory a file claims,
and a tensor may stand for far more numbers than its storage has. So the pickle's opcodes are followed here first,
without making anything of them (reading/opcodes): which names they call, how long each storage is, that each tensor
lies within its own, and how much all of it would be if it were written out.
"""

from __future__ import annotations

import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch

from peft_lightning.reading.limits import regular_size
from peft_lightning.reading.opcodes import Box, Machine

__all__ = ["check_pickled", "read_pickled"]

_MOST_PICKLE = 1 << 26
_MOST_ENTRIES = 500_000
_DAMAGE = (KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
_ZIP, _LEGACY = b"PK\x03\x04", (0x1950A86A20F9469CFC6C, 1001)


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds anything but tensors and plain containers.
        OSError: it cannot be read.
    """
    check_pickled(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file: all mean the same to the user
        raise ValueError(f"{type(error).__name__} while reading it") from error


def check_pickled(path: Path) -> None:
    """Look through a file of ``torch.save`` and make nothing of it.

    Raises:
        ValueError: the file is damaged, calls what it must not, or claims more than it has.
        OSError: it cannot be read.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        zipped = file.read(4) == _ZIP
        try:
            if zipped:
                _check_zip(path, size)
            elif size:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                    _check_legacy(view, size)
            else:
                raise ValueError("is empty")
        except (zipfile.BadZipFile, *_DAMAGE) as error:
            raise ValueError(f"is damaged ({type(error).__name__})") from None
        except (NotImplementedError, RuntimeError) as error:  # zipfile's words for what it cannot unpack
            raise ValueError(f"is packed in a way that torch does not write ({error})") from None


def _check_zip(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        sizes = {entry.filename: entry.file_size for entry in entries}
        if len(entries) > _MOST_ENTRIES or len(sizes) != len(entries):
            raise ValueError("is an archive with too many entries, or two of one name")
        packed = [e for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size]
        if packed or sum(sizes.values()) > size:
            raise ValueError("is an archive whose entries are larger than itself; torch packs nothing")
        found = [name for name in sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1 or sizes[found[0]] > _MOST_PICKLE:
            raise ValueError("is no archive of torch.save (it has no data.pkl, or a huge one)")
        root = found[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in sizes and (sizes[order] > 10 or archive.read(order) != b"little"):
            raise ValueError("was written on a machine of another byte order")
        with archive.open(found[0]) as stream:
            content = stream.read(_MOST_PICKLE + 1)
    storages = Machine().run(_Buffer(content)).storages
    for key, length in storages.items():
        if sizes.get(f"{root}data/{key}") != length:
            raise ValueError(f"the storage {key[:40]!r} has not the {length:,} bytes that it should have")


def _check_legacy(view: Any, size: int) -> None:
    """The form before torch 1.6: pickles one after another, then each storage after its length."""
    for wanted in _LEGACY:
        if Machine().run(view).result != wanted:
            raise ValueError("is no file of torch.save")
    Machine().run(view)
    storages = Machine().run(view).storages
    keys = Machine().run(view).result
    if not isinstance(keys, Box) or sorted(map(str, keys.parts)) != sorted(storages):
        raise ValueError("its storages are not those that its tensors need")
    for key in map(str, keys.parts):
        elements, length = int.from_bytes(view.read(8), "little"), storages[key]
        if length % max(elements, 1) or length // max(elements, 1) not in (0, 1, 2, 4, 8, 16):
            raise ValueError(f"the storage {key[:40]!r} has another length than its tensors say")
        if (end := view.tell() + length) > size:
            raise ValueError("is truncated")
        view.seek(end)


class _Buffer:
    """A pickle in memory; a claim of more bytes than there are gets those that are."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    def read(self, count: int) -> bytes:
        part = self._content[self._place : self._place + count]
        self._place += len(part)
        return part

    def readline(self) -> bytes:
        end = self._content.find(b"\n", self._place)
        return self.read((end + 1 if end >= 0 else len(self._content)) - self._place)

    def tell(self) -> int:
        return self._place
