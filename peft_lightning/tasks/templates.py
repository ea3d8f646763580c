"""Templates of prompts: what stands around the texts, as tokens that are never cut, and texts that may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from peft_lightning.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Filler", "Template", "shortened", "word_numbers"]

_MASK = "mask"
_END = " .,;:!?"
_CHANGES = ("bare", "lower")


@dataclass(frozen=True)
class _Slot:
    """Where the text number ``text`` stands; ``spaced`` if there is a space before it."""

    text: int
    changes: tuple[str, ...]
    spaced: bool

    def of(self, texts: Sequence[str]) -> str:
        text = texts[self.text].strip()
        if "bare" in self.changes:
            text = text.rstrip(_END)
        if "lower" in self.changes:
            text = text[:1].lower() + text[1:]
        return f" {text}" if self.spaced else text


class Template:
    """A template such as ``{0} It was {mask}.``

    A space before a text goes with the text, and one before the mask is left out: so the tokenizers of GPT-2 and
    RoBERTa see words as they stand in a sentence; others pay no heed to spaces.

    Args:
        text: ``{0}`` and ``{1}`` stand for the task's texts, each once, ``{mask}`` for the label's word.
        count: of texts.

    Raises:
        UsageError: it cannot be read, or lacks a text or the mask, or has one of them twice.
    """

    def __init__(self, text: str, count: int) -> None:
        self.parts: list[str | _Slot | None] = []  # None: the mask
        fields, literal = list[str](), ""
        try:
            parsed = list(Formatter().parse(text))
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"task.options.template is {text!r}; allowed: a text with {{0}} and {{mask}} ({error})"
            ) from None
        for before, field, changes, _ in parsed:
            literal += before
            if field is None:
                continue
            self._add(literal.rstrip())
            fields.append(field)
            slot = None if field == _MASK else self._slot(text, field, changes or "", literal[-1:].isspace(), count)
            self.parts.append(slot)
            literal = ""
        self._add(literal.rstrip())
        if sorted(fields) != [*map(str, range(count)), _MASK]:
            names = ", ".join(f"{{{name}}}" for name in [*range(count), _MASK])
            raise UsageError(f"task.options.template is {text!r}; allowed: {names}, each once")

    def _add(self, literal: str) -> None:
        if literal:
            self.parts.append(literal)

    @staticmethod
    def _slot(text: str, field: str, changes: str, spaced: bool, count: int) -> _Slot:
        names = tuple(changes.split(",")) if changes else ()
        if not field.isdecimal() or len(field) > 2 or int(field) >= count or not set(names) <= set(_CHANGES):
            what = f"{field}:{changes}" if changes else field
            raise UsageError(
                f"task.options.template is {text!r}, which has {{{what}}}; allowed: 0 to {count - 1} and {_MASK},"
                f" and after a colon {', '.join(_CHANGES)}"
            )
        return _Slot(int(field), names, spaced)


class Filler:
    """Fill a template in with a tokenizer's tokens.

    Args:
        template: what stands around the texts.
        tokenizer: has a mask, and tokens for a text's beginning and end.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        self._slots = [part for part in template.parts if isinstance(part, _Slot)]
        literals = iter(_tokens(tokenizer, [part for part in template.parts if isinstance(part, str)]))
        # Tokens, or None where a text stands, or the mask as one token.
        self._parts = [
            [self._tokenizer.mask_token_id] if part is None else None if isinstance(part, _Slot) else next(literals)
            for part in template.parts
        ]
        self._mask = template.parts.index(None)

    def slots(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return the tokens of each slot, for the task's texts of each row."""
        columns = [_tokens(self._tokenizer, [slot.of(row) for row in texts]) for slot in self._slots]
        return [list(row) for row in zip(*columns, strict=True)]

    def filled(self, slots: Sequence[Sequence[int]], word: int | None = None) -> tuple[list[int], int]:
        """Return the tokens of a prompt and the place of its mask; ``word`` is a token to stand there instead."""
        tokens, place, texts = list[int](), 0, iter(slots)
        for number, part in enumerate(self._parts):
            if number == self._mask:
                place = len(tokens)
                tokens.append(self._tokenizer.mask_token_id if word is None else word)
            else:
                tokens += next(texts) if part is None else part
        return tokens, place

    def sequence(
        self, slots: Sequence[Sequence[int]], examples: Sequence[Sequence[int]], max_length: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens of a sequence, where the mask to read is (1, else 0), and token types (1 in examples).

        Raises:
            DataError: not a token of each text would be left.
        """
        fixed = sum(len(part) for part in self._parts if part is not None)
        fixed += 2 + sum(len(example) + 1 for example in examples)
        kept = shortened(slots, max_length - fixed)
        if kept is None:
            raise DataError(
                f"template and examples take {fixed} of {max_length} tokens and leave no room for the text; allowed: a"
                " larger max_length, or shorter examples (task.options.longest_example)"
            )
        prompt, place = self.filled(kept)
        tokens = [self._tokenizer.cls_token_id, *prompt, self._tokenizer.sep_token_id]
        types = [0] * len(tokens)
        for example in examples:
            tokens += [*example, self._tokenizer.sep_token_id]
        types += [1] * (len(tokens) - len(types))
        return tokens, [int(number == place + 1) for number in range(len(tokens))], types


def shortened(parts: Sequence[Sequence[int]], room: int) -> list[Sequence[int]] | None:
    """Return token lists that take at most ``room``, or None where not a token of each would be left.

    The longest one, of several the first, loses its end first.

    >>> shortened([[1, 2, 3, 4], [5, 6]], 4)
    [[1, 2], [5, 6]]
    """
    lengths = [len(part) for part in parts]
    if sum(min(length, 1) for length in lengths) > room:
        return None
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts, without special ones at their ends."""
    if not texts:
        return []
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    tokens: list[list[int]] = encoded["input_ids"]
    return tokens


def word_numbers(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Return the token of each label word, as it stands after a space.

    Raises:
        UsageError: a word is not one token, or the same one as another word; or the tokenizer has no mask, or no tokens
            for a text's beginning and end.
    """
    for name in ("mask", "cls", "sep"):
        if getattr(tokenizer, f"{name}_token_id", None) is None:
            raise UsageError(
                f"tokenizer {tokenizer.name_or_path!r} has no {name} token; allowed for prompts: one that has"
            )
    numbers: list[int] = []
    for word, tokens in zip(words, _tokens(tokenizer, [f" {word}" for word in words]), strict=True):
        where = f"task.options.words has {word!r}, which tokenizer {tokenizer.name_or_path!r} reads as"
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            found = " ".join(map(str, tokenizer.convert_ids_to_tokens(tokens)))
            raise UsageError(f"{where} {found!r}; allowed: a word that is one token")
        if tokens[0] in numbers:
            raise UsageError(f"{where} {words[numbers.index(tokens[0])]!r}; allowed: a token of its own for each label")
        numbers.append(tokens[0])
    return numbers
