"""Labelled sentences in the form of SentEval's probing tasks: a split, a label and a text per row.

A TSV has these three columns, no header and no quoting; a Parquet file has columns of these names. A split is
called tr, va or te, or train, validation or test. Labels are words, whatever they look like. Line and row numbers
in messages count from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_lightning.errors import DataError, UsageError
from peft_lightning.reading.limits import read_bytes
from peft_lightning.reading.tables import check_parquet

__all__ = ["Sentences", "read_sentences"]

_SPLITS = {"tr": "tr", "va": "va", "te": "te", "train": "tr", "validation": "va", "test": "te"}
_COLUMNS = ("split", "label", "text")


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """One task.

    Attributes:
        name: the file's stem.
        classes: the labels of the training split, sorted.
        texts: split (tr, va, te) -> texts.
        labels: split -> numbers of the classes, as many.
    """

    name: str
    classes: tuple[str, ...]
    texts: dict[str, list[str]]
    labels: dict[str, list[int]]

    @property
    def majority(self) -> float:
        """Accuracy on the test split of the commonest class of the training split."""
        train, test = self.labels["tr"], self.labels["te"]
        commonest = max(range(len(self.classes)), key=train.count)
        return test.count(commonest) / len(test)


def read_sentences(path: str | Path) -> Sentences:
    """Read a file and check every row.

    Args:
        path: ``.tsv``, ``.txt`` (as SentEval names it) or ``.parquet``.

    Raises:
        UsageError: if there is no such file, or its name ends otherwise.
        DataError: names the file and the line of the first row that is wrong, or says what the file lacks.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"data = {path}: there is no such file")
    if path.suffix not in (".tsv", ".txt", ".parquet"):
        raise UsageError(f"data = {path}: must end in .tsv, .txt or .parquet")
    rows = _parquet(path) if path.suffix == ".parquet" else _separated(path)
    texts: dict[str, list[str]] = {"tr": [], "va": [], "te": []}
    labels: dict[str, list[str]] = {"tr": [], "va": [], "te": []}
    places: dict[str, list[str]] = {"tr": [], "va": [], "te": []}
    for place, (split, label, text) in rows:
        if split not in _SPLITS:
            raise DataError(f"{place}: split {split[:40]!r}; allowed: {', '.join(_SPLITS)}")
        if not label.strip() or not text.strip():
            raise DataError(f"{place}: the {'text' if label.strip() else 'label'} is empty")
        for column, value in ((texts, text), (labels, label), (places, place)):
            column[_SPLITS[split]].append(value)
    for split, found in texts.items():
        if not found:
            raise DataError(f"{path}: has no row of split {split!r}; needed: tr, va and te")
    classes = tuple(sorted(set(labels["tr"])))
    if len(classes) < 2:
        raise DataError(f"{path}: the training split has one label only, {classes[0]!r}; needed: at least two")
    return Sentences(name=path.stem, classes=classes, texts=texts, labels=_numbers(labels, places, classes))


def _numbers(
    labels: dict[str, list[str]], places: dict[str, list[str]], classes: Sequence[str]
) -> dict[str, list[int]]:
    numbers = {label: number for number, label in enumerate(classes)}
    for split in labels:
        for label, place in zip(labels[split], places[split], strict=True):
            if label not in numbers:
                raise DataError(f"{place}: label {label[:40]!r} does not occur in the training split")
    return {split: [numbers[label] for label in found] for split, found in labels.items()}


def _separated(path: Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    # By bytes: a text may hold characters that other ways of reading lines take for a line's end.
    try:
        content = read_bytes(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if number == len(lines) and not line:
            return
        try:
            columns = line.decode("utf-8").removesuffix("\r").split("\t")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: is not UTF-8 ({error.reason})") from error
        if len(columns) != len(_COLUMNS):
            raise DataError(f"{place}: has {len(columns)} columns; needed: {', '.join(_COLUMNS)}, separated by tabs")
        split, label, text = columns
        yield place, (split, label, text)


def _parquet(path: Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        check_parquet(path)
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    for name in _COLUMNS:
        if table.column_names.count(name) != 1:
            raise DataError(f"{path}: has no column {name!r}; there are: {', '.join(table.column_names)}")
    columns = [table[name].to_pylist() for name in _COLUMNS]
    for number, (split, label, text) in enumerate(zip(*columns, strict=True), start=1):
        place = f"{path}, row {number}"
        if not isinstance(split, str) or not isinstance(text, str) or not isinstance(label, str | int):
            raise DataError(f"{place}: split and text must be words, label a word or a whole number")
        yield place, (split, str(label), text)
