"""Questions about passages as windows of tokens.

A window is the question and a part of the passage between the tokens that a tokenizer puts round a pair. The parts of
one passage overlap. They are those that a fast tokenizer cuts (``truncation="only_second"`` with a ``stride``), but
each passage is tokenised once, however many questions are asked about it, and the windows are copied from its tokens.

Shapes: R questions, P passages, W windows of all questions, T tokens of all texts end to end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from peft_lightning.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Frame", "Tokens", "Windows", "frame_of", "tokens_of"]

_flat = chain.from_iterable


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a tokenizer puts round a question and a passage.

    Args:
        ids: the special tokens before the question, between the two and after the passage.
        types: their token types.
        texts: the token types of question and passage.
        null: which of these tokens stands for no answer: the part, and the place in it.
        typed: whether the tokenizer gives token types.
    """

    ids: tuple[np.ndarray, ...]
    types: tuple[np.ndarray, ...]
    texts: tuple[int, int]
    null: tuple[int, int]
    typed: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of tokens before, between and after."""
        return tuple(len(part) for part in self.ids)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of texts end to end.

    Args:
        ids: int32 [T].
        starts: where each token begins in its text, int32 [T].
        ends: where it ends, int32 [T].
        offsets: where each text's tokens begin, and T: int64 [texts + 1].
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [texts]."""
        return np.diff(self.offsets)

    def between(self, texts: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last token that hold a character of a stretch of a text.

        Args:
            texts: numbers of the texts, int64 [R].
            starts: where the stretches begin, int64 [R].
            ends: where they end, int64 [R].

        Returns:
            Numbers of tokens within their text, int64 [R] both. The last is before the first where no token does.
        """
        # One search finds all, since no text reaches into the numbers of the next one.
        beyond = 1 + max(int(self.ends.max(initial=0)), int(ends.max(initial=0)))
        base_T = np.repeat(np.arange(len(self.lengths)) * beyond, self.lengths)
        base_R = texts * beyond
        first_R = np.searchsorted(base_T + self.ends, base_R + starts, side="right")
        last_R = np.searchsorted(base_T + self.starts, base_R + ends, side="left") - 1
        return first_R - self.offsets[texts], last_R - self.offsets[texts]


class Windows:
    """The windows of R questions, in their order.

    Args:
        frame: of the tokenizer.
        questions: R texts.
        passages: P texts.
        asked: the passage that each question is asked about, int64 [R].
        size: tokens of a window at most.
        max_question: tokens to which a question is cut.
        stride: tokens of the passage that neighbouring windows share, less than what remains for it.
    """

    def __init__(
        self,
        frame: Frame,
        questions: Tokens,
        passages: Tokens,
        asked: np.ndarray,
        *,
        size: int,
        max_question: int,
        stride: int,
    ) -> None:
        self.frame, self.questions, self.passages, self.asked = frame, questions, passages, asked
        question_R, passage_R = np.minimum(questions.lengths, max_question), passages.lengths[asked]
        room_R = size - sum(frame.sizes) - question_R
        step_R = room_R - stride
        self.counts = 1 + -(-np.maximum(passage_R - room_R, 0) // step_R)
        self.rows = np.repeat(np.arange(len(asked)), self.counts)
        first_R = np.cumsum(self.counts) - self.counts
        number_W = np.arange(len(self.rows)) - first_R[self.rows]
        self.skipped = number_W * step_R[self.rows]
        held_W = np.minimum(room_R[self.rows], passage_R[self.rows] - self.skipped)
        before, between, after = (np.full(len(self.rows), part) for part in frame.sizes)
        # before, question, between, passage, after
        self.lengths = np.stack([before, question_R[self.rows], between, held_W, after], axis=1)

    def columns(self, characters: bool) -> dict[str, Sequence[np.ndarray]]:
        """Return the encoded columns, one int32 array a question.

        Args:
            characters: whether to tell where each token begins and ends in the passage, -1 outside of it.

        Returns:
            ``input_ids``, ``token_type_ids`` where there are any, ``sizes``, ``windows`` (per window the place of the
            token that stands for no answer, and where its part of the passage begins and ends), and on request
            ``token_starts`` and ``token_ends``.
        """
        frame, questions, passages = self.frame, self.questions, self.passages
        taken = self._taken()
        outside = np.full(sum(frame.sizes) + len(questions.ids), -1, np.int32)
        pools = {"input_ids": (*frame.ids, questions.ids, passages.ids)}
        if frame.typed:
            kinds = [np.full(len(t.ids), kind) for t, kind in zip((questions, passages), frame.texts, strict=True)]
            pools["token_type_ids"] = (*frame.types, *kinds)
        if characters:
            pools |= {"token_starts": (outside, passages.starts), "token_ends": (outside, passages.ends)}
        sizes_W = self.lengths.sum(1)
        tokens_R = np.bincount(self.rows, sizes_W, len(self.asked)).astype(np.int64)
        columns = {name: _split(np.concatenate(pool)[taken], tokens_R) for name, pool in pools.items()}
        first_W = self.lengths[:, :3].sum(1)
        marks_W3 = np.stack([self._null(), first_W, first_W + self.lengths[:, 3]], axis=1)
        return {**columns, "sizes": _split(sizes_W, self.counts), "windows": _split(marks_W3, self.counts)}

    def labels(self, first: np.ndarray, last: np.ndarray) -> Sequence[np.ndarray]:
        """Return per question the first and the last token of its answer in each window, int32 [2 * windows].

        Both are the token that stands for no answer where a window does not hold the whole one.

        Args:
            first: the answer's first token within the passage, int64 [R].
            last: its last one; before the first where there is no answer.
        """
        first_W, last_W = first[self.rows] - self.skipped, last[self.rows] - self.skipped
        holds_W = (first_W >= 0) & (last_W < self.lengths[:, 3]) & (first_W <= last_W)
        places_W2 = np.stack([first_W, last_W], axis=1) + self.lengths[:, :3].sum(1)[:, None]
        return _split(np.where(holds_W[:, None], places_W2, self._null()[:, None]), self.counts)

    def _null(self) -> np.ndarray:
        part, place = self.frame.null
        return self.lengths[:, : 2 * part].sum(1) + place

    def _taken(self) -> np.ndarray:
        """Which token of special ones, questions and passages end to end each token of the windows is."""
        before, between, _ = self.frame.sizes
        specials = sum(self.frame.sizes)
        question_W = specials + self.questions.offsets[self.rows]
        passage_W = specials + len(self.questions.ids) + self.passages.offsets[self.asked[self.rows]] + self.skipped
        fixed = (np.full(len(self.rows), place) for place in (0, before, before + between))
        before_W, between_W, after_W = fixed
        starts = np.stack([before_W, question_W, between_W, passage_W, after_W], axis=1).ravel()
        lengths = self.lengths.ravel()
        ends = np.cumsum(lengths)
        return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return what ``tokenizer`` puts round a pair.

    The token that stands for no answer is its [CLS], wherever that is, else the first special one.

    Raises:
        UsageError: it cannot tell where tokens are in a text, or does not put question, passage and special tokens so.
    """
    name = tokenizer.name_or_path
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"tokenizer {name!r} does not tell where a token is in its text; allowed: a fast tokenizer")
    probe = tokenizer("a", "a")
    layout = "".join("s" if part is None else "qp"[part] for part in probe.sequence_ids(0))
    parts = re.fullmatch("(s*)(q+)(s*)(p+)(s*)", layout)
    if parts is None or "s" not in layout:
        raise UsageError(
            f"tokenizer {name!r} encodes a pair as {layout!r}; allowed for kind span: a question (q), a passage (p),"
            " and at least one special token (s) round them, to stand for no answer"
        )
    types = probe.get("token_type_ids", [0] * len(layout))
    spans = [slice(*parts.span(group)) for group in (1, 3, 5)]
    ids = tuple(np.array(probe["input_ids"][span], np.int32) for span in spans)
    places = [(part, place) for part, members in enumerate(ids) for place in range(len(members))]
    stands = [(part, place) for part, place in places if ids[part][place] == tokenizer.cls_token_id]
    return Frame(
        ids=ids,
        types=tuple(np.array(types[span], np.int32) for span in spans),
        texts=(types[parts.start(2)], types[parts.start(4)]),
        null=(stands or places)[0],
        typed="token_type_ids" in probe,
    )


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the tokens of at least one text, without special ones."""
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, **options)
    offsets = np.cumsum([0, *map(len, encoded["input_ids"])])
    bounds = np.fromiter(_flat(_flat(encoded["offset_mapping"])), np.int32, 2 * offsets[-1])
    ids = np.fromiter(_flat(encoded["input_ids"]), np.int32, offsets[-1])
    return Tokens(ids=ids, starts=bounds[::2], ends=bounds[1::2], offsets=offsets)


def _split(values: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Cut values [n, ...] into rows of ``counts``, each flat."""
    width = values[0].size
    return np.split(values.astype(np.int32).ravel(), np.cumsum(counts)[:-1] * width)
