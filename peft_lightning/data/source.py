"""Where the rows of a split come from: Python, a folder of files, the toy language or the hub.

Row numbers in messages count from 0, as everywhere in this package.

A folder holds one file per split: Parquet, CSV (quoted as usual, a header line), TSV (a header line, no
quoting, as GLUE publishes it), JSON Lines, or JSON (an array of objects, or JSON Lines).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError, first_line
from peft_lightning.reading.json_text import check_json_lines, parse_json
from peft_lightning.reading.limits import read_bytes
from peft_lightning.reading.tables import check_parquet, check_separated
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    import pyarrow as pa

    _Rows: TypeAlias = pa.Table | list[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The raw rows of one split.

    Args:
        name: what messages call it: a path, or the place in Python.
        digest: changes when the rows do.
        read: returns all rows.
    """

    name: str
    digest: str
    read: Callable[[], _Rows]

    def slices(
        self, columns: tuple[str, ...], size: int, also: Mapping[str, str] | None = None
    ) -> Iterator[dict[str, list[Any]]]:
        """Yield ``columns`` for ``size`` rows at a time.

        Args:
            columns: their names.
            size: of a slice.
            also: column -> what it is called where it does not have its own name; ``a.b`` is the entry b of the
                mappings in the column a.

        Raises:
            DataError: the rows cannot be read, there are none, or a column is missing.
        """
        import pyarrow as pa

        try:
            rows = self.read()
            there = [*(rows[0] if rows else ())] if isinstance(rows, list) else rows.column_names  # may be no texts
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.name}: cannot be read: {first_line(error)}") from error
        if not len(rows):
            raise DataError(f"{self.name}: has no rows; allowed: at least one")
        names = {column: column if column in there else (also or {}).get(column, column) for column in columns}
        found = tuple(dict.fromkeys(name if name in there else name.partition(".")[0] for name in names.values()))
        if missing := [column for column, name in names.items() if not {name, name.partition(".")[0]} & set(there)]:
            raise DataError(f"{self.name}: has no column {missing[0]!r}; there are: {', '.join(there)}")
        if twice := [column for column in found if list(there).count(column) > 1]:
            raise DataError(f"{self.name}: has several columns {twice[0]!r}; allowed: one")
        for start in range(0, len(rows), size):
            if isinstance(rows, list):
                part = rows[start : start + size]
                values = {column: [row.get(column) for row in part] for column in found}
            else:
                values = self._plain(rows.select(found).slice(start, size))
            yield {column: self._column(values, name, start) for column, name in names.items()}

    def _plain(self, rows: pa.Table) -> dict[str, list[Any]]:
        """Rows as Python's values."""
        try:
            return rows.to_pydict()
        except (ValueError, OverflowError) as error:  # a text that is none, a date that Python does not know
            raise DataError(f"{self.name}: has a value that cannot be read: {first_line(error)}") from error

    def _column(self, values: Mapping[str, list[Any]], name: str, first_row: int) -> list[Any]:
        """A column, or an entry of its mappings."""
        if name in values:
            return values[name]
        column, _, entry = name.partition(".")
        for number, value in enumerate(values[column], first_row):
            if not isinstance(value, Mapping) or entry not in value:
                raise DataError(f"{self.name}: row {number}, column {column!r}: {value!r} has no entry {entry!r}")
        return [value[entry] for value in values[column]]


def open_source(task: Task, stage: str, rows: Mapping[str, Any] | None, root: str | None) -> Source:
    """Return the rows that ``task`` reads in ``stage``: from ``rows``, ``root``, the toy language or the hub.

    Args:
        task: says which split a stage reads.
        stage: train, validation, test or predict.
        rows: a list of dicts or a ``datasets.Dataset`` per split; a key that names the stage comes first.
        root: a folder that holds the task's folder, or the files themselves.

    Raises:
        UsageError: ``root`` or the task's folder is missing, or nothing says where the rows are.
        DataError: the split is missing, ambiguous or unreachable.
    """
    split = task.splits[stage]
    if rows is not None:
        key = stage if stage in rows else split
        if key not in rows:
            raise DataError(f"rows has no split {split!r} (stage {stage}); there are: {', '.join(rows)}")
        return _from_python(f"rows[{key!r}]", rows[key])
    if root is not None:
        # A text may look like a number or a truth value: the task says which it is, not the file's reader.
        strings = build_kind(task).strings()
        strings += tuple(task.also[name] for name in strings if name in task.also)
        return _from_file(_find_file(Path(root).expanduser(), task, split, stage), strings)
    if task.name.startswith("toy_"):
        return _from_python(f"{task.name}/{split}", toy_rows(task.name, split))
    if task.hub:
        return _from_hub(task, split)
    raise UsageError(f"root is null; allowed for task {task.name!r}: a folder, since it has no hub path")


def _from_python(name: str, rows: Any) -> Source:
    if hasattr(rows, "with_format"):
        # Reading through the format keeps to the rows that a selected or shuffled Dataset shows.
        return _from_table(name, rows.with_format("arrow")[:])
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UsageError(f"{name} is a {type(rows).__name__}; allowed: a list of dicts, or a datasets.Dataset")
    text = json.dumps([dict(row) for row in rows], sort_keys=True, default=repr)
    return Source(name=name, digest=hashlib.sha256(text.encode()).hexdigest(), read=lambda: rows)


def _from_table(name: str, table: pa.Table) -> Source:
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return Source(name=name, digest=hashlib.sha256(stream.getvalue()).hexdigest(), read=lambda: table)


def _from_hub(task: Task, split: str) -> Source:
    name = f"hub data set {'/'.join(task.hub)}, split {split}"
    import datasets

    try:
        path, _, revision = task.hub[0].partition("@")
        # ``None`` is the main branch.
        data = datasets.load_dataset(path, *task.hub[1:], split=split, revision=revision or None)
    # Whatever goes wrong in there (network, missing split, a changed repository), the way out is the same.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: cannot be loaded: {reason}; allowed without it: data.root, a folder of files"
        ) from error
    return _from_python(name, data)


def _find_file(root: Path, task: Task, split: str, stage: str) -> Path:
    if not root.is_dir():
        raise UsageError(f"root is {str(root)!r}; allowed: a folder that exists; --data.root names another one")
    files = {folder: _splits(folder) for folder in (root / task.folder, root)}
    folder, splits = next(((folder, splits) for folder, splits in files.items() if splits), (root, {}))
    if not splits:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise UsageError(
            f"root {str(root)!r} has neither a folder {task.folder!r} nor files of its own"
            f" ({', '.join(_READERS)}); folders there: {', '.join(folders) or 'none'}"
        )
    paths = splits.get(split, [])
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{folder}: has several files of split {split!r}: {names}; allowed: one")
    if not paths:
        there = ", ".join(sorted(splits))
        raise DataError(
            f"{folder}: has no split {split!r} (stage {stage}); there are: {there}; data.splits.{stage} chooses one"
        )
    return paths[0]


def _splits(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in _READERS and path.is_file():
                splits.setdefault(path.stem, []).append(path)
    return splits


def _from_file(path: Path, strings: tuple[str, ...]) -> Source:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(name=str(path), digest=f"{path.suffix} {digest}", read=lambda: _READERS[path.suffix](path, strings))


def _read_parquet(path: Path, strings: tuple[str, ...]) -> pa.Table:
    from pyarrow import parquet

    check_parquet(path)
    return parquet.read_table(path)


def _read_separated(path: Path, strings: tuple[str, ...]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    tabs = path.suffix == ".tsv"
    check_separated(path, quoted=not tabs)
    options = csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    # Without it, a text that looks like a number would become one.
    types = csv.ConvertOptions(column_types={column: pa.string() for column in strings})
    return csv.read_csv(path, parse_options=options, convert_options=types)


def _read_json(path: Path, strings: tuple[str, ...]) -> _Rows:
    raw = read_bytes(path)
    content = raw.decode("utf-8-sig")
    if path.suffix == ".json" and content.lstrip().startswith("["):
        rows = parse_json(content, once=False)
    else:
        check_json_lines(raw)
        rows = [parse_json(line, once=False) for line in content.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object")
    for number, row in enumerate(rows) if _HALF.search(content) else ():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"row {number} has half of a character (a lone surrogate)") from None
    return rows


_HALF = re.compile(r"\\u[dD][89a-fA-F]")


_READERS: dict[str, Callable[[Path, tuple[str, ...]], _Rows]] = {
    ".parquet": _read_parquet,
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".jsonl": _read_json,
    ".json": _read_json,
}
