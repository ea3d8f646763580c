"""Markdown tables, and the places in a Markdown file that hold generated ones.

A place is a pair of lines, ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; what stands between them
is replaced, and everything else in the file is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import DataError, UsageError

__all__ = ["generated", "markdown_table", "write_generated"]


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return ``rows`` as a Markdown table whose columns are the keys of the first row.

    Raises UsageError for no rows, or for rows with other keys.

    >>> markdown_table([{"arm": "full", "accuracy": 0.8}]).splitlines()[-1]
    '| full | 0.8 |'
    """
    if not rows:
        raise UsageError("rows is empty: a table needs at least one row")
    columns = list(rows[0])
    for number, row in enumerate(rows):
        if list(row) != columns:
            raise UsageError(f"rows[{number}] has the columns {list(row)}: the first row has {columns}")
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(value).replace("|", "\\|").replace("\n", " ") for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def generated(text: str, name: str) -> str | None:
    """Return what stands in the place ``name`` of a Markdown text, or None where it has no such place."""
    match = _place(name).search(text)
    return match.group(2).strip("\n") if match else None


def write_generated(path: str | Path, name: str, content: str) -> None:
    """Put ``content`` into the place ``name`` of a Markdown file, in one step.

    Raises DataError where the file has no such place, or several.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    count = len(_place(name).findall(text))
    if count != 1:
        raise DataError(f"{path} has {count} places for generated text named {name!r}: it must have one")
    body = content.strip("\n")
    changed = _place(name).sub(lambda match: f"{match.group(1)}\n{body}\n{match.group(3)}", text)
    atomic_write(path, lambda file: file.write(changed.encode()))


def _place(name: str) -> re.Pattern[str]:
    start, end = (f"<!-- {word}: {name} -->" for word in ("generated", "end"))
    return re.compile(f"({re.escape(start)})\n(.*?)({re.escape(end)})", re.DOTALL)
