"""A class for words inside a text: WiC and WSC.

A classifier reads a text, not positions in it. So the words meant are shown to it in the text itself: each stands
between two marks, one kind for the first word of a text and another one for the second, and the words may be
repeated in front. "Ann asked Mary to help her" with the words "Mary" and "her" becomes

    Mary, her: Ann asked * Mary * to help # her #

Sources: WiC, https://aclanthology.org/N19-1128; WSC as in SuperGLUE, https://arxiv.org/abs/1905.00537.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.kinds.classify import Classify
from peft_lightning.tasks.rows import encode_cut, name_list, places, whole_number
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

__all__ = ["Marked"]


@dataclass(frozen=True)
class _Text:
    """A text with marks from ``first`` to ``last``; its characters up to ``front`` repeat the words."""

    text: str
    front: int
    first: int
    last: int


class Marked(Classify):
    """Softmax over the classes of a text, or of a pair, in which words are marked.

    What is too long first loses what comes after the last mark, then what comes before the first one, and only then
    what is between them.

    Options:
        characters: by column of ``task.text``, pairs of columns: where a word begins, and where it has ended, in
            characters from 0.
        words: by column of ``task.text``, pairs of columns: the number from 0, between blanks, of the first word
            meant, and the words themselves. Case and punctuation at their place may differ, and the place may be one
            off, as in a few rows of WSC.
        front: columns that are repeated in front of the first text.
        marks: what stands around the first word of a text, the second one, and so on.
        id: a column that is handed on to the answers.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    options = {"characters": {}, "words": {}, "front": (), "marks": ("*", "#"), "id": ""}

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._front = name_list(self.settings, "front")
        marks = self.settings["marks"]
        if not isinstance(marks, list | tuple) or not all(isinstance(mark, str) and mark.strip() for mark in marks):
            raise UsageError(f"task.options.marks is {marks!r}; allowed: a list of texts")
        self._pairs = {option: self._pairs_of(option) for option in ("characters", "words")}
        counts = [sum(len(pairs.get(column, ())) for pairs in self._pairs.values()) for column in task.text]
        if not any(counts) or max(counts) > len(marks):
            raise UsageError(
                f"task.options names {max(counts)} words in a text; allowed: 1 to {len(marks)}, one for each of marks"
            )

    def _pairs_of(self, option: str) -> dict[str, list[tuple[str, str]]]:
        given = self.settings[option]
        for column, names in given.items() if isinstance(given, Mapping) else [("", given)]:
            named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            if column not in self.task.text or not named or len(names) % 2:
                columns = " or ".join(self.task.text)
                raise UsageError(f"task.options.{option} is {given!r}; allowed: {columns}: a list of pairs of columns")
        return {column: list(zip(names[::2], names[1::2], strict=True)) for column, names in given.items()}

    def further(self) -> tuple[str, ...]:
        """Return the columns of the words and of their places."""
        spans = [name for pairs in self._pairs.values() for row in pairs.values() for pair in row for name in pair]
        return (*self._front, *spans)

    def strings(self) -> tuple[str, ...]:
        """Return the columns of the texts and of the words."""
        words = [word for row in self._pairs["words"].values() for _, word in row]
        return (*super().strings(), *self._front, *words)

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode the texts with their marks; see :meth:`Kind.encode`."""
        fronts = [self.texts(rows, column, first_row) for column in self._front]
        marked = []
        for column in self.task.text:
            spans = self._spans(rows, column, first_row)
            texts = self.texts(rows, column, first_row)
            front = [", ".join(words) + ": " for words in zip(*fronts, strict=True)] if fronts else [""] * len(texts)
            marked.append([self._marked(*parts) for parts in zip(texts, spans, front, strict=True)])
            fronts = []

        def expendable(number: int, encoding: Encoding) -> list[int]:
            return _unmarked_first([texts[number] for texts in marked], encoding)

        columns: dict[str, Sequence[Any]] = {
            **encode_cut(tokenizer, [[text.text for text in texts] for texts in marked], max_length, expendable)
        }
        if labelled:
            columns["labels"] = self.targets_of(rows, first_row)
        if references and self.settings["id"]:
            columns["reference"] = self.records({"id": rows[self.settings["id"]]})
        return columns

    def _spans(self, rows: Mapping[str, Sequence[Any]], column: str, first_row: int) -> list[list[tuple[int, int]]]:
        """Where each text's words begin and end, in characters, row by row."""
        texts = self.texts(rows, column, first_row)
        spans: list[list[tuple[int, int]]] = [[] for _ in texts]
        for option, find in (("characters", _characters), ("words", _words)):
            for pair in self._pairs[option].get(column, ()):
                pairs = zip(*(rows[name] for name in pair), strict=True)
                for number, (text, (one, two)) in enumerate(zip(texts, pairs, strict=True)):
                    try:
                        spans[number].append(find(text, one, two))
                    except DataError as error:
                        names = " and ".join(map(repr, pair))
                        raise DataError(f"row {first_row + number}, columns {names}: {error}") from None
        return spans

    def _marked(self, text: str, spans: list[tuple[int, int]], front: str) -> _Text:
        # At one place an end comes before a beginning, and marks of a part are inside those of the whole.
        marks = sorted(
            (place, opens, -other, self.settings["marks"][number])
            for number, (start, end) in enumerate(spans)
            for place, opens, other in ((start, True, end), (end, False, start))
        )
        whole, start, ends = front.rstrip(), 0, []
        for place, _, _, mark in marks:
            whole = " ".join(filter(None, (whole, text[start:place].strip(), mark)))
            ends.append((len(whole) - len(mark), len(whole)))
            start = place
        whole = " ".join(filter(None, (whole, text[start:].strip())))
        first, last = (ends[0][0], ends[-1][1]) if ends else (len(front), len(front))
        return _Text(whole, len(front.rstrip()), first, last)


def _characters(text: str, start: Any, end: Any) -> tuple[int, int]:
    """Where a word is that is given by where it begins and ends."""
    first, last = whole_number(start), whole_number(end)
    if first is None or last is None or not 0 <= first < last <= len(text) or not text[first:last].strip():
        raise DataError(f"characters {start!r} to {end!r} hold no word; allowed: 0 to {len(text)}, the text's length")
    return first, last


def _words(text: str, index: Any, wanted: Any) -> tuple[int, int]:
    """Where the words ``wanted`` are that begin with the word number ``index`` of a text."""
    if not isinstance(wanted, str) or not wanted.strip():
        raise DataError(f"{wanted!r} is not a text of one word or more")
    words = [match.span() for match in re.finditer(r"\S+", text)]
    count = len(wanted.split())
    number = whole_number(index)
    if number is None or not 0 <= number < len(words):
        raise DataError(f"there is no word {index!r}; allowed: 0 to {len(words) - 1}, the number of words less one")
    exact = re.compile(r"\s+".join(map(re.escape, wanted.split())), re.IGNORECASE)
    near = [place for place in (number, number + 1, number - 1) if 0 <= place <= len(words) - count]
    for place in near:
        start, end = words[place][0], words[place + count - 1][1]
        if found := exact.search(text, start, end):
            return found.span()
        if _bare(text[start:end]) == _bare(wanted):
            return start, end
    there = " ".join(text[start:end] for start, end in words[number : number + count])
    raise DataError(f"word {number} of the text begins {there!r}; allowed: {wanted!r}, or where it stands")


def _bare(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


def _unmarked_first(texts: Sequence[_Text], encoding: Encoding) -> list[int]:
    """An order in which to cut tokens: see :class:`Marked`."""
    after, before, rest = list[int](), list[int](), list[int]()
    for number, text in reversed(list(enumerate(texts))):
        for place in reversed(places(encoding, number)):
            start, end = encoding.offsets[place]
            behind, ahead = start >= text.last, text.front <= start and end <= text.first
            (after if behind else before if ahead else rest).append(place)
    return [*after, *sorted(before), *rest]
