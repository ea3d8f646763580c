"""A small generated language, so that every command and test runs offline in seconds.

Each task needs a relation between words, no single word decides it: ``toy_sentiment`` asks for the tone of a
judgement that a negation turns round, ``toy_pairs`` whether two sentences speak of the same animal,
``toy_similarity`` how close the sizes of two animals are, ``toy_choice`` which sentence speaks of the
question's animal, ``toy_groups`` whether a size is at most another one, ``toy_marked`` whether two marked words
belong together, ``toy_topics`` the order and the sum of two sizes, ``toy_tags`` which words name an
animal that is judged, and how, ``toy_span`` where a text has a word like those of the question, with its negation. No
example of one split occurs in another one.
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


def _copy(rng: random.Random) -> dict[str, Any]:
    negation = [rng.choice(_NEGATIONS)] if rng.randrange(2) else []
    words = [_subject(rng), rng.choice(_COPULAS), *negation, rng.choice([*_GOOD, *_BAD, *_SIZES])]
    return {"text": " ".join(words), "copy": " ".join(words)}


def _span(rng: random.Random) -> dict[str, Any]:
    animal, tones = rng.choice(_ANIMALS), (*_GOOD, *_BAD)
    negation = f"{rng.choice(_NEGATIONS)} " if rng.randrange(2) else ""
    judgement = negation + rng.choice(tones)
    parts = [
        f"{rng.choice(_DETERMINERS)} {rng.choice(_COLOURS)} {animal}",
        rng.choice(_VERBS),
        f"{rng.choice(_COPULAS)} {rng.choice(_SIZES)}",
        f"{rng.choice(_COPULAS)} {judgement}",
    ]
    rng.shuffle(parts)
    context, (answer, like) = " ".join(parts), rng.choice([(animal, _ANIMALS), (judgement, tones)])
    question = " ".join(rng.sample([word for word in like if word not in answer.split()], 2))
    answers = {"text": [answer], "answer_start": [f" {context} ".index(f" {answer} ")]}
    return {"question": question, "context": context, "answers": answers}


def _choice(rng: random.Random) -> dict[str, Any]:
    animals = rng.sample(_ANIMALS, rng.randrange(2, len(_ANIMALS) + 1))
    right = rng.randrange(len(animals))
    choices = [f"{rng.choice(_DETERMINERS)} {animal} {rng.choice(_VERBS)}" for animal in animals]
    question = f"{rng.choice(_DETERMINERS)} {rng.choice(_COLOURS)} {animals[right]}"
    return {"question": question, "choices": choices, "label": right}


def _groups(rng: random.Random) -> dict[str, Any]:
    sizes = [rng.randrange(len(_SIZES)) for _ in range(2)]
    first, other = rng.choice(_ANIMALS), rng.choice(_ANIMALS)
    row = {"paragraph": f"the {first} is {_SIZES[sizes[0]]}", "question": f"that {other} is"}
    return {**row, "answer": f"{rng.choice(_COLOURS)} {_SIZES[sizes[1]]}", "label": int(sizes[1] <= sizes[0])}


def _marked(rng: random.Random) -> dict[str, Any]:
    parts = [(rng.choice(_ANIMALS), rng.choice(_VERBS)) for _ in range(2)]
    together = rng.randrange(2)
    # As above: where the first word is, tells something of the label, but not more than 2/3.
    first = int(rng.randrange(3) == 0)
    second = first if together else 1 - first
    text = " ".join(f"{rng.choice(_DETERMINERS)} {' '.join(part)}" for part in parts)
    words = {"index1": 3 * first + 1, "word1": parts[first][0], "index2": 3 * second + 2, "word2": parts[second][1]}
    return {"text": text, **words, "label": together}


def _topics(rng: random.Random) -> dict[str, Any]:
    sizes = [rng.randrange(len(_SIZES)) for _ in range(2)]
    texts = [f"{rng.choice(_DETERMINERS)} {rng.choice(_ANIMALS)} is {_SIZES[size]}" for size in sizes]
    topics = {"growth": sizes[1] > sizes[0], "bulk": sum(sizes) >= len(_SIZES)}
    return {"sentence1": texts[0], "sentence2": texts[1], "label": [name for name, yes in topics.items() if yes]}


def _tags(rng: random.Random) -> dict[str, Any]:
    # An animal with its colour is an entity if a judgement follows, which also says of which type.
    name = [*([rng.choice(_COLOURS)] if rng.randrange(2) else []), rng.choice(_ANIMALS)]
    words, kind = rng.choice([(_GOOD, "LIKED"), (_BAD, "DISLIKED"), (_SIZES, "")])
    tags = [f"B-{kind}", f"I-{kind}"][: len(name)] if kind else ["O"] * len(name)
    tokens = [rng.choice(_DETERMINERS), *name, rng.choice(_COPULAS), rng.choice(words)]
    return {"tokens": tokens, "label": ["O", *tags, "O", "O"]}


_TASKS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "toy_sentiment": _sentiment,
    "toy_pairs": _pairs,
    "toy_similarity": _similarity,
    "toy_choice": _choice,
    "toy_groups": _groups,
    "toy_marked": _marked,
    "toy_topics": _topics,
    "toy_tags": _tags,
    "toy_span": _span,
    "toy_copy": _copy,
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
