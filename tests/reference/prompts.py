"""Prompts by hand: whole strings that are tokenised at once, likeness by dense vectors, and cutting one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


def shortened(lengths: Sequence[int], room: int) -> list[int] | None:
    """Lengths after the longest part, of several the first, has lost its end again and again."""
    found = list(lengths)
    while sum(found) > room:
        longest = next(n for n, length in enumerate(found) if length == max(found))
        if found[longest] == 1:
            return None
        found[longest] -= 1
    return found


def likeness(text: str, shots: Sequence[str]) -> list[float]:
    """Cosine of tf-idf vectors, by a matrix over all words of the shots."""
    words = sorted({word for shot in shots for word in re.findall(r"\w+", shot.lower())})
    rows = np.array([[re.findall(r"\w+", part.lower()).count(w) for w in words] for part in (*shots, text)], float)
    df = (rows[:-1] > 0).sum(0)
    rows *= np.log((1 + len(shots)) / (1 + df)) + 1
    norms = np.linalg.norm(rows, axis=1)
    with np.errstate(invalid="ignore"):
        return [float(value) for value in np.nan_to_num(rows[:-1] @ rows[-1] / norms[:-1] / norms[-1])]
