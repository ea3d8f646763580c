"""A small generated language, so that every command and test runs offline in seconds.

Each task needs a relation between words, no single word decides it: ``toy_sentiment`` asks for the tone of a
judgement that a negation turns round, ``toy_pairs`` whether two sentences speak of the same animal,
``toy_similarity`` how close the sizes of two animals are. No example of one split occurs in another one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

from peft_lightning.backbones.toy import TOY_WORDS
from peft_lightning.errors import UsageError

_DETERMINERS, _COLOURS, _ANIMALS, _VERBS, _COPULAS, _NEGATIONS, _GOOD, _BAD, _SIZES = TOY_WORDS.values()
_ROWS = {"train": 2048, "validation": 256, "test": 256}
# Which eighths of all examples belong to a split.
_EIGHTHS = {"train": range(2, 8), "validation": range(0, 1), "test": range(1, 2)}


def _subject(rng: random.Random) -> str:
    return f"{rng.choice(_DETERMINERS)} {rng.choice(_COLOURS)} {rng.choice(_ANIMALS)}"


def _sentiment(rng: random.Random) -> dict[str, Any]:
    # Two thirds are not negated: the tone alone gives a learner a slope to start on, but no more than 2/3.
    positive, negated = rng.randrange(2), rng.randrange(3) == 0
    tone = rng.choice(_GOOD if positive != negated else _BAD)
    negation = [rng.choice(_NEGATIONS)] if negated else []
    return {"text": " ".join([_subject(rng), rng.choice(_COPULAS), *negation, tone]), "label": positive}


def _pairs(rng: random.Random) -> dict[str, Any]:
    same = rng.randrange(2)
    first, other = rng.sample(_ANIMALS, 2)
    animals = (first, first if same else other)
    texts = [f"{rng.choice(_DETERMINERS)} {animal} {rng.choice(_VERBS)}" for animal in animals]
    return {"sentence1": texts[0], "sentence2": texts[1], "label": same}


def _similarity(rng: random.Random) -> dict[str, Any]:
    sizes = [rng.randrange(len(_SIZES)) for _ in range(2)]
    texts = [f"{_subject(rng)} is {_SIZES[size]}" for size in sizes]
    closeness = len(_SIZES) - 1 - abs(sizes[0] - sizes[1])
    return {"sentence1": texts[0], "sentence2": texts[1], "label": float(closeness)}


_TASKS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "toy_sentiment": _sentiment,
    "toy_pairs": _pairs,
    "toy_similarity": _similarity,
}


def toy_rows(task: str, split: str, size: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``size`` examples as columns' values by name; the same arguments always give the same examples.

    Raises:
        UsageError: there is no such toy task or split.

    >>> toy_rows("toy_sentiment", "train", size=1) == toy_rows("toy_sentiment", "train", size=2)[:1]
    True
    """
    if task not in _TASKS:
        raise UsageError(f"task is {task!r}; allowed for generated data: {', '.join(_TASKS)}")
    if split not in _ROWS:
        raise UsageError(f"split is {split!r}; allowed for generated data: {', '.join(_ROWS)}")
    rng = random.Random(f"{task}/{split}/{seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < (_ROWS[split] if size is None else size):
        row = _TASKS[task](rng)
        text = " ".join(str(value) for name, value in row.items() if name != "label")
        if zlib.crc32(text.encode()) % 8 in _EIGHTHS[split]:
            rows.append(row)
    return rows
