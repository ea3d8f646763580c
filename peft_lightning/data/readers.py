"""Readers of a corpus's formats: each yields texts in order, and with each the number of its document.

The texts of a document, one after another, are the document. None of them needs much memory.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_lightning.errors import DataError, first_line
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.tables import check_parquet

__all__ = ["READERS", "hub_splits", "read_hub"]

# Bytes of a line that are read at once.
_LINE = 1 << 20
# Characters of short lines that are handed on together.
_TOGETHER = 1 << 14
_ROWS = 1000
# Bytes of a row at most.
_LONGEST = 1 << 26
_COLUMNS = ("doc_id", "text")


def hub_splits(name: str) -> Mapping[str, Any]:
    """Return the splits of a hub data set, each a ``datasets.Dataset``.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    try:
        return dict(datasets.load_dataset(*name.split(":", 1)))
    # Whatever goes wrong in there (network, no such data set, a changed repository), the way out is the same.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: is no file or folder, and no hub data set that can be loaded: {reason}") from error


def read_hub(data: Any, name: str) -> Iterator[tuple[int, str]]:
    """Yield the texts of a ``datasets.Dataset``.

    Raises:
        DataError: it has no column ``text``, or a row of it holds something else.
    """
    columns = _columns(data.column_names, name)
    # Other columns may be costly to read.
    yield from _read_rows(data.select_columns(columns).iter(_ROWS), name)


def _columns(there: list[str], name: str) -> list[str]:
    if "text" not in there:
        raise DataError(f"{name}: has no column 'text'; there are: {', '.join(there)}")
    return [column for column in _COLUMNS if column in there]


def _read_rows(batches: Iterable[Mapping[str, list[Any]]], name: str) -> Iterator[tuple[int, str]]:
    row, document, previous, started = 0, -1, None, False
    for columns in batches:
        texts = columns["text"]
        for key, text in zip(columns.get("doc_id", [None] * len(texts)), texts, strict=True):
            if text is not None and not isinstance(text, str):
                raise DataError(f"{name}: row {row} holds a {type(text).__name__} as 'text'; allowed: a string")
            if key is None or key != previous:
                document, previous, started = document + 1, key, False
            if text:
                yield document, f"\n{text}" if started else text
                started = True
            row += 1


def _read_text(path: Path) -> Iterator[tuple[int, str]]:
    decoder, place = codecs.getincrementaldecoder("utf-8-sig")(), 0
    document, texts, length, new_line = 0, list[str](), 0, True
    try:
        with path.open("rb") as file:
            while part := file.readline(_LINE):
                place += len(part)
                text = decoder.decode(part)
                empty = new_line and not text.strip()
                new_line = part.endswith(b"\n")
                if not empty:
                    texts.append(text)
                    length += len(text)
                if texts and (empty or length >= _TOGETHER):
                    yield document, "".join(texts)
                    texts, length = [], 0
                document += empty
        texts.append(decoder.decode(b"", final=True))
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], place - len(error.object) + error.start
        raise DataError(f"{path}: is no UTF-8 text: byte {at} is {byte:#04x}; allowed: UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    yield document, "".join(texts)


def _read_parquet(path: Path) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        check_parquet(path)
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, str(path))
            batches = file.iter_batches(batch_size=_ROWS, columns=columns)
            yield from _read_rows((batch.to_pydict() for batch in batches), str(path))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from error


def _read_json(path: Path) -> Iterator[tuple[int, str]]:
    yield from _read_rows(_json_rows(path), str(path))


def _json_rows(path: Path) -> Iterator[dict[str, list[Any]]]:
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST):
                if len(line) == _LONGEST:
                    raise ValueError(f"has a line of more than {_LONGEST:,} bytes")
                if not line.strip():
                    continue
                row = parse_json(line.decode("utf-8-sig"), once=False)
                if not isinstance(row, dict) or "text" not in row:
                    raise DataError(f"{path}: row {number} is no object with 'text'; allowed: one such object a line")
                if isinstance(row["text"], str):
                    # JSON can name halves of characters, which are no text.
                    row["text"].encode()
                yield {"text": [row["text"]], "doc_id": [row.get("doc_id")]}
                number += 1
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: row {number} cannot be read: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, str]]]] = {
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
    ".parquet": _read_parquet,
    ".jsonl": _read_json,
    ".json": _read_json,
}
