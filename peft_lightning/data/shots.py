"""Which rows are the shots: K of each class, in an order that follows from a seed and each row's content alone.

Neither the order of a file, nor its format, nor any library's random numbers take part: each row's place is a hash of
the seed, its inputs and its label, so methods and machines get the same examples.

The rule, for rows of one class and of several (a sentence with entities of several types): classes go from the rarest
to the most frequent, and of each one the next rows in order are taken until K of all the rows taken so far have it. So
every class has K rows at least, and exactly K where rows have one class. Without classes, K rows are taken in all.
The dev shots are taken in the same way from what is left. No two rows of both have the same inputs, without regard to
case and spaces; of a question with several answers one is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_lightning.data.source import Source
from peft_lightning.errors import DataError
from peft_lightning.tasks.kinds.base import Kind

__all__ = ["Pool", "draw", "read_pool", "sample", "select"]

_SLICE = 1000
_PARTS = ("the shots", "the dev shots beside the shots")


@dataclass(frozen=True)
class Pool:
    """The labelled rows of a split, a value a row.

    Attributes:
        name: of the split, for messages.
        numbers: of the rows in the split.
        keys: digests of inputs and label.
        inputs: digests of the inputs, equal where only case and spaces differ; of the question, where rows are the
            answers to one.
        classes: names of the row's classes.
        grouped: whether rows are answers to questions.
    """

    name: str
    numbers: list[int]
    keys: list[bytes]
    inputs: list[bytes]
    classes: list[tuple[str, ...]]
    grouped: bool

    def order(self, seed: int) -> list[int]:
        """Return the places of all rows in the order of ``seed``."""
        places = [_digest(b"%d " % seed + key) for key in self.keys]
        return sorted(range(len(places)), key=lambda row: (places[row], self.numbers[row]))

    def others(self, numbers: Collection[int], count: int, seed: int) -> list[int]:
        """Return the numbers of ``count`` rows with other inputs than ``numbers``, in the order of ``seed``.

        No two have the same inputs; all there are, if there are fewer.

        Raises:
            DataError: there is none.
        """
        chosen = set(numbers)
        taken = {inputs for number, inputs in zip(self.numbers, self.inputs, strict=True) if number in chosen}
        found: dict[bytes, int] = {}
        for row in self.order(seed):
            if len(found) < count and self.inputs[row] not in taken:
                found.setdefault(self.inputs[row], self.numbers[row])
        if not found:
            raise DataError(f"{self.name}: has no row beside the shots and the dev shots; wanted: {count}")
        return list(found.values())


def read_pool(source: Source, kind: Kind) -> Pool:
    """Return the rows of ``source`` that have a label.

    Raises:
        DataError: the rows cannot be read, or a label is not allowed; names the row.
    """
    group = tuple(kind.settings.get("group", ()))
    pool, first_row = Pool(source.name, [], [], [], [], bool(group)), 0
    label, wanted = kind.task.label, kind.required()
    for rows in source.slices(kind.columns(labelled=True), _SLICE, kind.task.also):
        for number, value in enumerate(rows[label]):
            if str(value) in kind.task.unlabelled:
                continue
            target = _target(kind, value, f"{source.name}: row {first_row + number}, column {label!r}")
            whole = _text([rows[name][number] for name in wanted])
            same = _text(_alike([rows[name][number] for name in group or wanted]))
            pool.numbers.append(first_row + number)
            pool.keys.append(_digest(f"{whole} {_text(target)}".encode()))
            pool.inputs.append(_digest(same.encode()))
            pool.classes.append(kind.classes(target) if kind.classes() else ())
        first_row += len(rows[label])
    return pool


def draw(pool: Pool, shots: int, seed: int, classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the numbers of the shots and of the dev shots, each in the order of ``seed``.

    Args:
        pool: what to draw from.
        shots: K.
        seed: of the order.
        classes: of which K rows each are wanted; none: K rows in all.

    Raises:
        DataError: there are fewer; names the class, how many there are and how many are wanted.
    """
    order = pool.order(seed)
    counts = Counter(name for names in pool.classes for name in names)
    rarest_first = sorted(classes, key=lambda name: counts[name])  # equally rare ones stay in the task's order
    taken: set[bytes] = set()
    parts = []
    for what in _PARTS:
        chosen = _take(pool, order, shots, rarest_first, taken, what)
        parts.append([pool.numbers[row] for row in order if row in chosen])
    return parts[0], parts[1]


def _take(
    pool: Pool, order: Sequence[int], shots: int, classes: Sequence[str], taken: set[bytes], what: str
) -> set[int]:
    chosen: set[int] = set()
    for name in classes or (None,):
        there = sum(name is None or name in pool.classes[row] for row in chosen)
        for row in order:
            if there >= shots:
                break
            if (name is None or name in pool.classes[row]) and pool.inputs[row] not in taken:
                taken.add(pool.inputs[row])
                chosen.add(row)
                there += 1
        if there < shots:
            of = "has" if name is None else f"class {name!r} has"
            raise DataError(f"{pool.name}: {of} {there} different rows for {what}; wanted: {shots}")
    return chosen


def sample(pool: Pool, count: int) -> list[int]:
    """Return the numbers of ``count`` rows, ascending, or of all if there are no more; always the same ones.

    Questions stay whole: the last one that would go beyond ``count`` and all after it are left out.
    """
    units: dict[bytes, list[int]] = {}
    for row in pool.order(0):
        units.setdefault(pool.inputs[row] if pool.grouped else b"%d" % row, []).append(pool.numbers[row])
    chosen: list[int] = []
    for numbers in units.values():
        if len(chosen) + len(numbers) > count:
            break
        chosen += numbers
    if not chosen:
        raise DataError(f"{pool.name}: a question has more rows than test_rows = {count}; allowed: more")
    return sorted(chosen)


def select(source: Source, kind: Kind, numbers: Sequence[int], what: str) -> Source:
    """Return the rows ``numbers`` of ``source``, in this order, with the columns that ``kind`` reads."""
    wanted, found, first_row = set(numbers), dict[int, Mapping[str, Any]](), 0
    for columns in source.slices(kind.columns(labelled=True), _SLICE, kind.task.also):
        count = len(columns[kind.task.label])
        for number in range(count):
            if first_row + number in wanted:
                found[first_row + number] = {name: values[number] for name, values in columns.items()}
        first_row += count
    rows = [found[number] for number in numbers]
    return Source(name=f"{source.name}, {what}", digest=_digest(_text(rows).encode()).hex(), read=lambda: rows)


def _target(kind: Kind, value: Any, where: str) -> Any:
    """What a label means, so that a name and a number are the same; as it is where there are no classes."""
    if not kind.classes():
        return value
    try:
        return kind.target(value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _alike(value: Any) -> Any:
    """The same without case, and with one space where there are several, in all texts of it."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, Mapping):
        return {key: _alike(part) for key, part in value.items()}
    return [_alike(part) for part in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
