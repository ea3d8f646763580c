"""What several kinds of task share: names, whole numbers, and cutting what is too long where it hurts least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any

from peft_lightning.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_cut", "name_list", "places", "second_last", "whole_number"]


def name_list(settings: Mapping[str, Any], option: str, least: int = 0) -> tuple[str, ...]:
    """Return ``settings[option]``, a list of different names.

    Raises:
        UsageError: it is something else, or has fewer than ``least`` names.
    """
    names = settings[option]
    # A lone string is a sequence of letters, which would pass every later check.
    whole = isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names)
    if not whole or len(names) < least or len(set(names)) < len(names):
        wanted = f"a list of {least or 'any number of'} or more" if least else "a list of"
        raise UsageError(f"task.options.{option} is {names!r}; allowed: {wanted} different names")
    return tuple(names)


def whole_number(value: Any) -> int | None:
    """Return ``value`` if it is a whole number, NumPy's too; None for all else, also for true and false.

    >>> whole_number(3), whole_number(True), whole_number(3.0)
    (3, None, None)
    """
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else None


def encode_cut(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[str]],
    max_length: int,
    expendable: Callable[[int, Encoding], Iterable[int]],
) -> dict[str, list[list[int]]]:
    """Encode texts, or pairs of texts, and cut those that are too long.

    Args:
        tokenizer: a fast one.
        texts: a list of texts, or two of the same length.
        max_length: tokens of a sequence at most.
        expendable: says for a sequence that is too long which tokens go first. It gets the sequence's number and its
            encoding, and names no special token.

    Returns:
        ``input_ids`` and, if the tokenizer gives them, ``token_type_ids``.

    Raises:
        UsageError: the tokenizer is none that says where its tokens come from.
    """
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path
        raise UsageError(f"tokenizer {name!r} is a {type(tokenizer).__name__}; allowed for this kind: a fast one")
    # Without ``verbose`` it would warn of lengths that are cut below.
    encoded = tokenizer(*texts, truncation=False, return_attention_mask=False, verbose=False)
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    for number, tokens in enumerate(columns["input_ids"]):
        if (over := len(tokens) - max_length) > 0:
            gone = set(islice(expendable(number, encoded.encodings[number]), over))
            for sequences in columns.values():
                sequences[number] = [value for place, value in enumerate(sequences[number]) if place not in gone]
    return columns


def places(encoding: Encoding, text: int) -> list[int]:
    """Return where the tokens of the first text (0) or of the second one (1) are, without special tokens."""
    return [place for place, of in enumerate(encoding.sequence_ids) if of == text]


def second_last(number: int, encoding: Encoding) -> list[int]:
    """Return an order to cut in: the first text from its end, and the second one only when nothing is left of it."""
    return [*reversed(places(encoding, 0)), *reversed(places(encoding, 1))]
