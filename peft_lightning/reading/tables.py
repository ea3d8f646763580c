"""Files of rows are looked through before they are read: a page of a few bytes can stand for gigabytes.

Compared with a Parquet file's size are the sums at its end, the lengths that its pages promise, and its texts written
out. Columns take memory of their own, kilobytes each, however little is in them.
"""

from __future__ import annotations

import csv
import io
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lightning.reading.limits import regular_size
from peft_lightning.reading.pages import unpacked_bytes

if TYPE_CHECKING:
    from pyarrow import parquet

__all__ = ["check_parquet", "check_separated"]

# What a file may be in memory: so much in any case, and so many times its size.
_LEAST, _TIMES = 1 << 29, 40
_MOST_COLUMNS = 10_000
_HEADER = 1 << 20  # characters that a line of names may have, as pyarrow has it


def check_parquet(path: Path) -> None:
    """Compare what a Parquet file would be in memory with its size.

    Raises:
        ValueError: it would be too much, or the file is damaged (pyarrow's own kinds are ValueErrors).
        OSError: it cannot be read.
    """
    from pyarrow import parquet

    most = max(_LEAST, _TIMES * regular_size(path))
    with parquet.ParquetFile(path) as file:
        about, schema = file.metadata, file.schema
        _refuse_columns(about.num_columns)
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        claimed = sum(max(column.total_uncompressed_size, 0) for column in columns)
        claimed = max(claimed, _promised(path, columns))
        _refuse(max(claimed, 8 * sum(max(column.num_values, 0) for column in columns), about.num_rows), most)
        texts = [schema.column(n).path for n in range(len(schema)) if schema.column(n).physical_type == "BYTE_ARRAY"]
        if any("DICTIONARY" in str(column.encodings) for column in columns if column.path_in_schema in texts):
            _check_texts(path, texts, len(groups), most)


def check_separated(path: Path, *, quoted: bool) -> None:
    """Count the columns of a file of lines that begins with their names.

    Args:
        path: of the file.
        quoted: whether commas divide it and quotes are as usual (CSV); otherwise tabs do and there are none (TSV).

    Raises:
        ValueError: there are too many, or a name does not end.
        OSError: it cannot be read.
    """
    regular_size(path)
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        begin = io.StringIO(file.read(_HEADER), newline="")
    kind: dict[str, Any] = {} if quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        names = next((row for row in csv.reader(begin, **kind) if row), [])
    except csv.Error as error:
        raise ValueError(f"its names of columns cannot be read ({error})") from None
    _refuse_columns(len(names))


def _refuse_columns(count: int) -> None:
    if count > _MOST_COLUMNS:
        raise ValueError(f"has more than {_MOST_COLUMNS:,} columns, which is all that is allowed")


def _promised(path: Path, columns: list[Any]) -> int:
    """What the pages themselves say; the sums at the file's end are of whoever wrote them."""
    total = 0
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as view:
            for column in (column for column in columns if column.num_values):  # without values it has no pages
                first = column.data_page_offset
                if column.has_dictionary_page and column.dictionary_page_offset is not None:
                    first = min(first, column.dictionary_page_offset)
                total += unpacked_bytes(view, first, first + column.total_compressed_size)
    return total


def _check_texts(path: Path, names: list[str], groups: int, most: int) -> None:
    """A word of a dictionary is stored once, however often it is used; here too, until it is known how often."""
    from pyarrow import parquet

    total = 0
    with parquet.ParquetFile(path, read_dictionary=names) as file:
        for number in range(groups):
            total += sum(_written_out(file, number, name) for name in names)
            _refuse(total, most)


def _written_out(file: parquet.ParquetFile, group: int, name: str) -> int:
    import pyarrow as pa
    from pyarrow import compute

    total = 0
    for column in file.read_row_group(group, columns=[name]).columns:
        for chunk in column.chunks:
            while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type) or pa.types.is_struct(chunk.type):
                chunk = chunk.field(0) if pa.types.is_struct(chunk.type) else chunk.values
            if pa.types.is_dictionary(chunk.type) and len(chunk):
                lengths = compute.binary_length(chunk.dictionary).cast(pa.int64())
                total += compute.sum(lengths.take(chunk.indices)).as_py() or 0
    return total


def _refuse(bytes_: int, most: int) -> None:
    if bytes_ > most:
        raise ValueError(f"would be {bytes_:,} bytes in memory; allowed for a file of its size: {most:,}")
