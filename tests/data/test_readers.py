"""Readers of a corpus's formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from peft_lightning.data.readers import READERS, hub_splits, read_hub
from peft_lightning.errors import DataError


def read(path: Path) -> list[str]:
    """The documents of a file."""
    documents: dict[int, str] = {}
    for number, text in READERS[path.suffix](path):
        documents[number] = documents.get(number, "") + text
    assert list(documents) == sorted(documents)
    return [text for text in documents.values() if text.strip()]


# -- text files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n\nthree\n", ["one\ntwo\n", "three\n"]),
        (b"one\ntwo", ["one\ntwo"]),
        (b"\n\n one \n \t\n\n\ntwo\n\n\n", [" one \n", "two\n"]),
        (b"one\r\n\r\ntwo\r\n", ["one\r\n", "two\r\n"]),
        (b"\xef\xbb\xbfone\n\ntwo", ["one\n", "two"]),
        ("é\n\nü".encode(), ["é\n", "ü"]),
        (b"", []),
        (b"\n \n", []),
    ],
)
def test_empty_lines_end_documents(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    for suffix in (".txt", ".text", ".md"):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        assert read(path) == expected


@given(lines=st.lists(st.text(st.sampled_from("aé \U0001f600"), max_size=12), max_size=12), together=st.integers(1, 9))
def test_long_lines_and_documents_come_in_parts(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], together: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "file.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    expected, document = [], ""
    for line in [*(f"{line}\n" for line in lines[:-1]), *lines[-1:], ""]:
        if line.strip():
            document += line
        elif document:
            expected.append(document)
            document = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_lightning.data.readers._TOGETHER", together)
        assert read(path) == expected
        if all(line.strip() == line for line in lines):
            # As many bytes as a character has, so that most are read in two parts.
            patch.setattr("peft_lightning.data.readers._LINE", 4)
            assert read(path) == expected


@pytest.mark.parametrize(
    ("content", "byte", "value"),
    [
        (b"one\ntwo \xff three", 8, "0xff"),
        (b"\xff\xfeo\0n\0e\0", 0, "0xff"),
        (b"\xef\xbb\xbfone\n\xe9t\xe9\n", 7, "0xe9"),
        (b"one\n\ntw\xc3", 7, "0xc3"),
    ],
)
def test_text_that_is_not_utf8(tmp_path: Path, content: bytes, byte: int, value: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"file.txt: is no UTF-8 text: byte {byte} is {value}; allowed: UTF-8"):
        read(path)


# -- rows


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as Parquet, a few to a row group."""
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


FORMATS = pytest.mark.parametrize(
    ("suffix", "write"), [(".parquet", as_parquet), (".jsonl", as_json), (".json", as_json)]
)
ROWS: list[dict[str, Any]] = [
    {"doc_id": "a", "text": "one"},
    {"doc_id": "a", "text": None},
    {"doc_id": "a", "text": "two"},
    {"doc_id": "b", "text": ""},
    {"doc_id": "b", "text": "three"},
    {"doc_id": "a", "text": "four"},
    {"doc_id": None, "text": "five"},
    {"doc_id": None, "text": "six"},
]


@FORMATS
@pytest.mark.parametrize("together", [1, 3, 1000])
def test_rows_of_a_document(
    tmp_path: Path, suffix: str, write: Callable[..., None], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_lightning.data.readers._ROWS", together)
    write(tmp_path / f"file{suffix}", ROWS)
    assert read(tmp_path / f"file{suffix}") == ["one\ntwo", "three", "four", "five", "six"]


@FORMATS
def test_rows_without_documents(tmp_path: Path, suffix: str, write: Callable[..., None]) -> None:
    write(tmp_path / f"file{suffix}", [{"text": text, "more": 1} for text in ("one", "one", "", "two\n\nthree")])
    assert read(tmp_path / f"file{suffix}") == ["one", "one", "two\n\nthree"]


@FORMATS
def test_rows_that_are_no_text(tmp_path: Path, suffix: str, write: Callable[..., None]) -> None:
    write(tmp_path / f"file{suffix}", [{"text": 1}])
    with pytest.raises(DataError, match=rf"file{suffix}: row 0 holds a int as 'text'; allowed: a string"):
        read(tmp_path / f"file{suffix}")


def test_parquet_without_text(tmp_path: Path) -> None:
    as_parquet(tmp_path / "file.parquet", [{"content": "a", "title": "b"}])
    with pytest.raises(DataError, match=r"file.parquet: has no column 'text'; there are: content, title"):
        read(tmp_path / "file.parquet")


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file.parquet").write_text("PAR1 or not")
    with pytest.raises(DataError, match=r"file.parquet: cannot be read: "):
        read(tmp_path / "file.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 1 cannot be read: Expecting property name"),
        ('{"content": "a"}', "row 1 is no object with 'text'; allowed: one such object a line"),
        ('["text"]', "row 1 is no object with 'text'"),
        (r'{"text": "\ud800"}', "row 1 cannot be read: .* surrogates not allowed"),
        ("[" * 100_000, "row 1 cannot be read: "),
    ],
)
def test_wrong_json_names_the_row(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "file.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"file.jsonl: {message}"):
        read(tmp_path / "file.jsonl")


def test_json_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="file.jsonl: row 0 cannot be read: 'utf-8' codec can't decode byte 0xff"):
        read(tmp_path / "file.jsonl")


def test_file_that_vanished(tmp_path: Path) -> None:
    for suffix in READERS:
        with pytest.raises(DataError, match=rf"file{suffix}: .*cannot be read: .*No such file"):
            read(tmp_path / f"file{suffix}")


# -- the hub


def test_hub_rows() -> None:
    data = datasets.Dataset.from_list([{**row, "image": 0} for row in ROWS])
    documents: dict[int, str] = {}
    for number, text in read_hub(data, "name"):
        documents[number] = documents.get(number, "") + text
    assert [*documents.values()] == ["one\ntwo", "three", "four", "five", "six"]
    with pytest.raises(DataError, match="name: has no column 'text'; there are: image"):
        list(read_hub(data.select_columns(["image"]), "name"))


def test_hub_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def load(*names: str) -> dict[str, int]:
        asked.append(names)
        return {"train": 1}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert hub_splits("some/name") == hub_splits("some/name:configuration") == {"train": 1}
    assert asked == [("some/name",), ("some/name", "configuration")]


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise ConnectionError("no network\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = "some/name: is no file or folder, and no hub data set that can be loaded: no network$"
    with pytest.raises(DataError, match=message):
        hub_splits("some/name")
