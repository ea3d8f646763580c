"""Tables in Markdown and the places that hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_lightning.errors import DataError, UsageError
from peft_lightning.study.tables import generated, markdown_table, write_generated

_TEXT = "# Title\n\n<!-- generated: a -->\nold\n<!-- end: a -->\nmiddle\n<!-- generated: b -->\n<!-- end: b -->\n"


def test_table() -> None:
    rows = [{"arm": "full", "accuracy": 0.8}, {"arm": "a|b\nc", "accuracy": 0.5}]
    assert markdown_table(rows) == "\n".join(
        ["| arm | accuracy |", "| --- | --- |", "| full | 0.8 |", "| a\\|b c | 0.5 |"]
    )


def test_table_without_rows() -> None:
    with pytest.raises(UsageError, match="rows is empty"):
        markdown_table([])


def test_table_with_other_columns() -> None:
    with pytest.raises(UsageError, match=r"rows\[1\] has the columns \['b'\]"):
        markdown_table([{"a": 1}, {"b": 1}])


def test_only_the_named_place_changes(tmp_path: Path) -> None:
    path = tmp_path / "R.md"
    path.write_text(_TEXT)
    write_generated(path, "b", r"new \1 text")
    write_generated(path, "a", "| x |\n")
    assert generated(path.read_text(), "a") == "| x |"
    assert generated(path.read_text(), "b") == r"new \1 text"
    assert path.read_text().startswith("# Title\n\n<!-- generated: a -->\n| x |\n<!-- end: a -->\nmiddle\n")


def test_writing_twice_is_writing_once(tmp_path: Path) -> None:
    path = tmp_path / "R.md"
    path.write_text(_TEXT)
    write_generated(path, "a", "table")
    once = path.read_text()
    write_generated(path, "a", "table")
    assert path.read_text() == once


def test_no_such_place(tmp_path: Path) -> None:
    path = tmp_path / "R.md"
    path.write_text(_TEXT)
    with pytest.raises(DataError, match="has 0 places for generated text named 'c': it must have one"):
        write_generated(path, "c", "table")
    assert generated(_TEXT, "c") is None
