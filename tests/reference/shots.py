"""Few-shot draws by looking at every row again and again, from raw rows and their classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def drawn(
    rows: Sequence[Row], classes: Sequence[set[str]], targets: Sequence[Any], names: Sequence[str], **options: Any
) -> tuple[list[int], list[int]]:
    """Numbers of the shots and of the dev shots; ``names`` empty: so many in all.

    Args:
        rows: inputs only.
        classes: of each row.
        targets: of each row, as numbers.
        names: all classes.
        options: shots and seed.
    """
    shots, seed = options["shots"], options["seed"]

    def place(number: int) -> bytes:
        text = f"{_json(list(rows[number].values()))} {_json(targets[number])}"
        return _digest(f"{seed} ".encode() + _digest(text.encode()))

    def like(number: int) -> str:
        words = [word for value in rows[number].values() for word in ([value] if isinstance(value, str) else value)]
        return _json([word.casefold().split() for word in words])

    ordered = sorted(range(len(rows)), key=lambda number: (place(number), number))
    rare = sorted(names, key=lambda name: (sum(name in own for own in classes), list(names).index(name)))
    found: list[list[int]] = [[], []]
    for part in found:
        for name in rare or [""]:
            while sum(not name or name in classes[number] for number in part) < shots:
                used = {like(number) for taken in found for number in taken}
                fits = (n for n in ordered if (not name or name in classes[n]) and like(n) not in used)
                part.append(next(fits))
    return sorted(found[0], key=ordered.index), sorted(found[1], key=ordered.index)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
