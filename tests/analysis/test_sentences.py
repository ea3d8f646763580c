"""Files of labelled sentences: read whole, or refused with the line that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from peft_lightning.analysis.sentences import read_sentences
from peft_lightning.errors import DataError, UsageError

ROWS = [
    ("tr", "PAST", "She slept ."),
    ("tr", "PRES", 'He says " so'),
    ("va", "PAST", "They ran\u2028on ."),
    ("te", "PRES", "It is ."),
    ("tr", "PRES", "We are ."),
    ("te", "PAST", "It was ."),
    ("te", "PRES", "I am ."),
]


def tsv(path: Path, rows: Any = ROWS, end: str = "\n") -> Path:
    path.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["tense.txt", "tense.tsv"])
def test_a_tsv(name: str, end: str, tmp_path: Path) -> None:
    found = read_sentences(tsv(tmp_path / name, end=end))
    assert found.name == "tense" and found.classes == ("PAST", "PRES")
    assert found.texts["tr"] == ["She slept .", 'He says " so', "We are ."]
    assert found.texts["va"] == ["They ran\u2028on ."]  # one line, whatever else calls it two
    assert found.labels == {"tr": [0, 1, 1], "va": [0], "te": [1, 0, 1]}
    assert found.majority == pytest.approx(2 / 3)


@pytest.mark.parametrize("names", [("tr", "va", "te"), ("train", "validation", "test")])
def test_a_parquet_file_holds_the_same(names: tuple[str, str, str], tmp_path: Path) -> None:
    split = dict(zip(("tr", "va", "te"), names, strict=True))
    rows = [{"text": text, "label": label, "split": split[part], "more": 1} for part, label, text in ROWS]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "tense.parquet")
    assert read_sentences(tmp_path / "tense.parquet") == read_sentences(tsv(tmp_path / "tense.tsv"))
    numbered = [{**row, "label": int(row["label"] == "PRES")} for row in rows]
    parquet.write_table(pa.Table.from_pylist(numbered), tmp_path / "n.parquet")
    assert read_sentences(tmp_path / "n.parquet").classes == ("0", "1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("dev", "PAST", "x"), r"line 8: split 'dev'; allowed: tr, va, te"),
        (("tr", "PAST"), r"line 8: has 2 columns; needed: split, label, text"),
        (("tr", "PAST", "a", "b"), r"line 8: has 4 columns"),
        (("",), r"line 8: has 1 columns"),
        (("tr", " ", "x"), r"line 8: the label is empty"),
        (("tr", "PAST", " "), r"line 8: the text is empty"),
        (("te", "FUTURE", "x"), r"line 8: label 'FUTURE' does not occur in the training split"),
    ],
)
def test_a_bad_line_is_named(row: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_sentences(tsv(tmp_path / "x.tsv", [*ROWS, row, ("va", "PAST", "more")]))


def test_what_a_file_lacks(tmp_path: Path) -> None:
    file = tmp_path / "x.tsv"
    file.write_bytes(b"tr\tA\tgood\ntr\tB\t\xff\n")
    with pytest.raises(DataError, match=r"x.tsv, line 2: is not UTF-8"):
        read_sentences(file)
    with pytest.raises(DataError, match="has no row of split 'va'; needed: tr, va and te"):
        read_sentences(tsv(file, [row for row in ROWS if row[0] != "va"]))
    with pytest.raises(DataError, match="has one label only, 'PAST'"):
        read_sentences(tsv(file, [row for row in ROWS if row[1] == "PAST"]))
    with pytest.raises(DataError, match="has no row of split 'tr'"):
        read_sentences(tsv(file, []))
    with pytest.raises(UsageError, match="there is no such file"):
        read_sentences(tmp_path / "ghost.tsv")
    with pytest.raises(UsageError, match="must end in .tsv, .txt or .parquet"):
        read_sentences(tsv(tmp_path / "x.csv"))


def test_bad_parquet(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="x.parquet: cannot be read"):
        read_sentences(file)
    parquet.write_table(pa.table({"split": ["tr"], "label": ["A"]}), file)
    with pytest.raises(DataError, match="has no column 'text'; there are: split, label"):
        read_sentences(file)
    parquet.write_table(pa.table({"split": ["tr", "tr"], "label": ["A", "B"], "text": ["x", None]}), file)
    with pytest.raises(DataError, match="x.parquet, row 2: split and text must be words"):
        read_sentences(file)
