"""Encoded splits on disk, found by their content.

A split is tokenised once. The file's name is a digest of everything that changes the result, so no file is
ever out of date. The file is one Arrow IPC record batch. It is written under a temporary name in the same
folder, synced and renamed, so a reader sees either nothing or all of it; one process of a job writes it, the
others wait. It is mapped into memory, so the processes of a machine share one copy. A damaged file is built again.

Notation: a ragged column holds a list of whole numbers per row, or the bytes of a text; a scalar column one number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from peft_lightning.data.lock import build_once
from peft_lightning.errors import UsageError
from peft_lightning.reading.limits import regular_size

if TYPE_CHECKING:
    import pyarrow as pa

_FORMAT = 2
_log = logging.getLogger(__name__)


class Encoded:
    """The columns of an encoded split as numpy arrays.

    Args:
        scalars: [N] per scalar column.
        ragged: per ragged column the values of all rows end to end, and their N + 1 offsets.
        digest: changes when the columns do, if it is known.
    """

    def __init__(
        self,
        scalars: Mapping[str, np.ndarray],
        ragged: Mapping[str, tuple[np.ndarray, np.ndarray]],
        digest: str = "",
    ) -> None:
        self.scalars, self.ragged, self.digest = dict(scalars), dict(ragged), digest

    def __len__(self) -> int:
        return len(self.lengths())

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, int64 [N]."""
        return np.diff(self.ragged["input_ids"][1])

    def gather(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Return the scalar columns [B] of ``rows`` [B], and per ragged column its values and lengths [B]."""
        scalars = {name: values[rows] for name, values in self.scalars.items()}
        ragged = {}
        for name, (values, offsets) in self.ragged.items():
            starts = offsets[rows]
            lengths = offsets[rows + 1] - starts
            ends = np.cumsum(lengths)
            positions = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
            ragged[name] = values[positions], lengths
        return scalars, ragged


def cache_folder(folder: str | None) -> Path:
    """Return ``folder``, or the default one: ``$PEFT_LIGHTNING_CACHE``, or a folder in the user's cache.

    Raises:
        UsageError: ``folder`` is no path.
    """
    if not isinstance(folder, str | os.PathLike | None):
        raise UsageError(f"cache_dir is {folder!r}; allowed: a folder, or null")
    return Path(folder or os.environ.get("PEFT_LIGHTNING_CACHE") or "~/.cache/peft_lightning").expanduser()


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return a digest of ``parts``, of plain values, that is the same in every process.

    >>> cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
    True
    """
    text = json.dumps({"format": _FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(folder: Path, key: str, build: Callable[[], pa.RecordBatch]) -> Encoded:
    """Return what ``build`` makes, from the file of ``key`` where that is whole; of several processes, one builds.

    Args:
        folder: created if missing.
        key: from :func:`cache_key`.
        build: returns the columns: ``large_list`` of integers or ``large_string`` where ragged, else numbers; without
            nulls.

    Raises:
        DataError: the file cannot be written.
    """
    path = folder / f"{key}.arrow"
    return build_once(path, lambda path: _read(path, key), lambda file: _write(file, key, build()))


def schema_text(schema: pa.Schema) -> str:
    """Names and types of columns, to be written beside a checksum of their bytes."""
    return str(schema.remove_metadata())


def _views(batch: pa.RecordBatch) -> Encoded:
    import pyarrow as pa

    scalars, ragged = {}, {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_large_list(column.type):
            ragged[name] = column.values.to_numpy(), column.offsets.to_numpy()
        elif pa.types.is_large_string(column.type):
            _, offsets, values = (np.frombuffer(part or b"", np.uint8) for part in column.buffers())
            ragged[name] = values, offsets.view(np.int64)[: len(column) + 1]
        else:
            scalars[name] = column.to_numpy()
    return Encoded(scalars, ragged)


def _checksum(data: Encoded) -> bytes:
    value = 0
    for array in (*data.scalars.values(), *(array for pair in data.ragged.values() for array in pair)):
        value = zlib.crc32(array.data, value)
    return str(value).encode()


def _write(file: BinaryIO, key: str, batch: pa.RecordBatch) -> None:
    import pyarrow as pa

    about = {"key": key, "checksum": _checksum(_views(batch)), "schema": schema_text(batch.schema)}
    schema = batch.schema.with_metadata(about)
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)


def _read(path: Path, key: str) -> Encoded:
    import pyarrow as pa

    regular_size(path)
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = reader.get_batch(0)
        batch.validate()  # offsets that lead outside of the file would end the process, not raise
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    metadata, data = reader.schema.metadata or {}, _views(batch)
    # the checksum is that of the bytes; names and types decide what they are
    expected = {"key": key.encode(), "checksum": _checksum(data), "schema": schema_text(batch.schema).encode()}
    if any(metadata.get(name.encode()) != value for name, value in expected.items()):
        raise ValueError("its checksum differs")
    # Of the content: the key also changes with the version of this package.
    data.digest = f"{len(data)} rows, {metadata[b'checksum'].decode()}"
    return data
