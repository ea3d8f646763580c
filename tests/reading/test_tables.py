"""A file of rows that would be much in memory is refused before it is, whatever the sums at its end say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from peft_lightning.reading import tables
from peft_lightning.reading.pages import unpacked_bytes
from peft_lightning.reading.tables import check_parquet, check_separated

COLUMNS: dict[str, Any] = {
    "number": list(range(3000)),
    "text": [f"word {i % 7}" for i in range(3000)],
    "list": [[i, i + 1] for i in range(3000)],
    "none": [None] * 2999 + [1.5],
}


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_are_as_long_as_their_writer_says(
    compression: str, version: str, dictionary: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(
        pa.table(COLUMNS), path, compression=compression, data_page_version=version, use_dictionary=dictionary,
        data_page_size=2000, row_group_size=1000,
    )  # fmt: skip
    about, content = parquet.ParquetFile(path).metadata, memoryview(path.read_bytes())
    for group in (about.row_group(number) for number in range(3)):
        for column in (group.column(number) for number in range(4)):
            first = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
            found = unpacked_bytes(content, first, first + column.total_compressed_size)
            assert found >= 8 * column.num_values
            if not dictionary and column.path_in_schema != "none":  # where no value is shorter; the sum counts headers
                headers = column.total_uncompressed_size - found
                assert 0 < headers < 100 + column.total_uncompressed_size / 4
    check_parquet(path)


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_no_row_is_no_damage(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table(COLUMNS).slice(0, 0), path, compression=compression)
    check_parquet(path)


def test_values_of_a_page_count_however_few_bytes_stand_for_them() -> None:
    # lengths 10 and 0; in a struct in field 5, of data, or 8, of its second version: 1,000 values
    for field in (b"\x2c", b"\x5c"):
        header = b"\x15\x00\x15\x14\x15\x00" + field + b"\x15\xd0\x0f\x00\x00"
        assert unpacked_bytes(memoryview(header), 0, len(header)) == 8000


def varint(value: int) -> bytes:
    """A whole number as Thrift writes it."""
    value, found = value << 1, b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def test_sums_that_are_too_small_do_not_hide_what_pages_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"text": ["a" * 2_000_000] * 4})
    parquet.write_table(table, path, compression="gzip", use_dictionary=False, write_statistics=False)
    true = parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    content = path.read_bytes()
    old, new = varint(true), varint(1_100_000)
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new))
    assert parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 1_100_000
    monkeypatch.setattr(tables, "_LEAST", 1 << 21)
    with pytest.raises(ValueError, match=r"would be 8,000,\d\d\d bytes in memory; allowed for a file of its size"):
        check_parquet(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x15\x00\x15\x04", "out of the file"),  # ends too early
        (b"\x15\x00\x00", "without a length"),
        (b"\x15\x00\x15\x01\x15\x04\x00", "without a length"),  # a length below zero
        (b"\x15\x00\x15\x04\x15\x90\x4e\x00", "out of the file"),
        (b"\x15" + b"\xff" * 11, "too many bytes"),
        (b"\x1c" * 20, "nested too deeply"),
        (b"\x19\xf5\xff\xff\xff\x7f", "list that leads out"),
        (b"\x19" + b"\x19" * 20, "list that leads out|no known type"),
        (b"\x1e\x00", "no known type"),
    ],
)
def test_headers_that_are_damaged(header: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpacked_bytes(memoryview(header), 0, len(header))


def test_a_word_that_is_used_often_counts_as_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": ["a" * 10_000] * 5000}), path)
    assert path.stat().st_size < 5000
    check_parquet(path)
    monkeypatch.setattr(tables, "_LEAST", 1 << 24)
    with pytest.raises(ValueError, match="would be 50,000,000 bytes in memory"):
        check_parquet(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ""])
@pytest.mark.parametrize("quoted", [True, False])
def test_columns_are_counted_before_they_are_made(quoted: bool, end: str, tmp_path: Path) -> None:
    mark, name = (",", '"a, ""b""\n"') if quoted else ("\t", '"a')
    path = tmp_path / "x"
    path.write_bytes(f"{end}{mark.join([name] * 10_000)}{end}1{end}".encode())
    check_separated(path, quoted=quoted)
    path.write_bytes(f"{end}{mark.join([name] * 10_001)}{end}".encode())
    with pytest.raises(ValueError, match="has more than 10,000 columns"):
        check_separated(path, quoted=quoted)


def test_a_name_of_a_column_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('"' + "a" * 200_000)
    with pytest.raises(ValueError, match="its names of columns cannot be read"):
        check_separated(path, quoted=True)


def test_a_parquet_file_of_many_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({str(number): [1] for number in range(10_001)}), path)
    with pytest.raises(ValueError, match="has more than 10,000 columns"):
        check_parquet(path)
