"""Which examples are shown beside a text: one of each label, at random or from those that are most like it.

LM-BFF (https://arxiv.org/abs/2012.15723, section 6) draws from all shots of a label, or from the half of them whose
sentence vectors are nearest to the text's. Here nearness is the cosine of tf-idf vectors over the shots' words, which
needs no second model: ``tf idf``, with ``idf = ln((1 + n) / (1 + df)) + 1`` over n shots, of which df have the word.

All draws are hashes of the text, the set and the label: they are the same for every method and machine. A shot with
the text itself is never shown.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from peft_lightning.errors import DataError

__all__ = ["Demonstrations"]


class Demonstrations:
    """Draw sets of demonstrations.

    Args:
        texts: of the shots.
        labels: number of each shot's label word.
        words: the label words.
        similar: whether only the nearer half of each label's shots is drawn from.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int], words: Sequence[str], similar: bool) -> None:
        self.words, self.similar = tuple(words), similar
        self._alike = [_plain(text) for text in texts]
        self._by_label = [[n for n, own in enumerate(labels) if own == label] for label in range(len(words))]
        counts = [Counter(_words(text)) for text in texts]
        with_word = Counter(word for count in counts for word in count)
        self._idf = {word: math.log((1 + len(texts)) / (1 + df)) + 1 for word, df in with_word.items()}
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, count in enumerate(counts):
            for word, weight in self._unit(count).items():
                self._postings[word].append((number, weight))

    def sets(self, text: str, count: int) -> list[tuple[int, ...]]:
        """Return ``count`` different sets for ``text``, or all there are: numbers of shots in the order of the labels.

        Raises:
            DataError: a label has no shot but the text itself.
        """
        plain = _plain(text)
        candidates = [[n for n in own if self._alike[n] != plain] for own in self._by_label]
        if (empty := next((label for label, own in enumerate(candidates) if not own), None)) is not None:
            there = len(self._by_label[empty])
            raise DataError(f"label word {self.words[empty]!r} has {there} shot(s), none but the text; wanted: another")
        if self.similar:
            near = self.similarities(text)
            candidates = [sorted(own, key=lambda n: (-near[n], n))[: -(-len(own) // 2)] for own in candidates]
        wanted = min(count, math.prod(map(len, candidates)))
        found: dict[tuple[int, ...], None] = {}
        turn = 0
        while len(found) < wanted:
            found[tuple(own[_draw(f"{turn} {label} {plain}", len(own))] for label, own in enumerate(candidates))] = None
            turn += 1
        return list(found)

    def similarities(self, text: str) -> list[float]:
        """Return the cosine of ``text`` with each shot; words that no shot has count for nothing."""
        near = [0.0] * len(self._alike)
        for word, weight in self._unit(Counter(_words(text))).items():
            for number, other in self._postings.get(word, ()):
                near[number] += weight * other
        return near

    def _unit(self, counts: Counter[str]) -> dict[str, float]:
        weights = {word: count * self._idf[word] for word, count in counts.items() if word in self._idf}
        length = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {word: weight / length for word, weight in weights.items()}


def _draw(key: str, count: int) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % count


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
