"""Slow oracles of extractive questions: scores as SQuAD's scripts define them, spans and labels by trying all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def words(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and articles."""
    kept = [character for character in text.lower() if character not in _PUNCTUATION]
    result = ""
    for _, run in itertools.groupby(kept, key=lambda character: character.isalnum()):
        piece = "".join(run)
        result += " " if piece in ("a", "an", "the") else piece
    return result.split()


def exact(found: str, gold: str) -> float:
    """1 where the words are the same."""
    return float(words(found) == words(gold))


def f1(found: str, gold: str, version: int) -> float:
    """Harmonic mean of precision and recall of words."""
    predicted, left = words(found), words(gold)
    if version == 2 and (not predicted or not left):
        return float(predicted == left)
    total, same = len(predicted) + len(left), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / total if same else 0.0


def evaluate(found: Sequence[str], golds: Sequence[Sequence[str]], version: int) -> dict[str, float]:
    """All metrics, as shares; 0 over no question."""
    exacts, f1s = [], []
    for answer, texts in zip(found, golds, strict=True):
        if version == 2:
            texts = [text for text in texts if words(text)] or [""]
        exacts.append(max(exact(answer, text) for text in texts))
        f1s.append(max(f1(answer, text, version) for text in texts))
    result = {"exact_match": _mean(exacts), "f1": _mean(f1s)}
    if version == 2:
        result["has_answer_f1"] = _mean([value for value, texts in zip(f1s, golds, strict=True) if texts])
        result["no_answer_accuracy"] = _mean([value for value, texts in zip(exacts, golds, strict=True) if not texts])
    return result


def spans(
    starts: Sequence[float], ends: Sequence[float], inside: Sequence[bool], longest: int
) -> list[tuple[float, int, int]]:
    """All spans of a window: score, first token and last token, the best first."""
    found = []
    for first in range(len(starts)):
        for last in range(first, len(ends)):
            if last - first < longest and inside[first] and inside[last]:
                found.append((starts[first] + ends[last], first, last))
    return sorted(found, reverse=True)


def place(offsets: Sequence[tuple[int, int]], inside: Sequence[bool], start: int, end: int) -> tuple[int, int] | None:
    """First and last token of a window that hold a character of ``[start, end)``; None where a character is missing.

    A character that no token holds, such as a space, is not missed.
    """
    tokens = [t for t, (a, b) in enumerate(offsets) if inside[t] and any(start <= c < end for c in range(a, b))]
    return (tokens[0], tokens[-1]) if tokens else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
