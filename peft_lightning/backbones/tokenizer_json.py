"""``tokenizer.json`` is looked through before it is used: a small one can make much of little, or stop the process.

Its rules are carried out by a library that ends in a panic, not in an error, where they contradict each other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import Any

__all__ = ["check_tokenizer", "is_failure"]

# Characters for one, over all rules that replace some; those that there are write at most eight.
_MOST_GROWTH = 256
# Tokens that are put around a text; there are seldom more than four.
_MOST_AROUND = 256


def check_tokenizer(content: Any) -> None:
    """Refuse rules by which a text would grow without bound, and such as contradict each other.

    Args:
        content: of ``tokenizer.json``.

    Raises:
        ValueError: says which rule.
    """
    if not isinstance(content, dict):
        raise ValueError("holds no mapping")
    growth = 1
    for rule in _rules({key: value for key, value in content.items() if key not in ("model", "added_tokens")}):
        kind = rule.get("type")
        if kind in ("Replace", "Prepend"):
            growth *= max(1, len(str(rule.get("content", rule.get("prepend", "")))))
        elif kind == "Precompiled":
            growth *= max(1, _longest(rule.get("precompiled_charsmap")))
        elif kind == "TemplateProcessing":
            _check_template(rule)
        elif kind == "FixedLength" and rule.get("length") == 0:
            raise ValueError("FixedLength: length = 0")
        if growth > _MOST_GROWTH:
            raise ValueError(f"{kind}: with the rules before it, a character may become more than {_MOST_GROWTH}")
    cut = content.get("truncation")
    if isinstance(cut, dict) and not _number(cut.get("stride")) < _number(cut.get("max_length")):
        raise ValueError("truncation: stride must be below max_length")


def is_failure(error: BaseException) -> bool:
    """Whether an error is one, and no request to end; a panic in Rust is, though Python does not say so."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _rules(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a type, outermost first."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        for part in value.values():
            yield from _rules(part)
    elif isinstance(value, list):
        for part in value:
            yield from _rules(part)


def _longest(charsmap: Any) -> int:
    """Characters of the longest text that a map of SentencePiece puts in the place of another.

    It is the number of bytes of a trie, that trie, and the texts, each with a zero at its end.
    """
    try:
        content = base64.b64decode(str(charsmap or ""), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("Precompiled: precompiled_charsmap is not base64") from None
    trie = int.from_bytes(content[:4], "little")
    if len(content) < 4 or trie % 4 or trie > len(content) - 4:
        raise ValueError("Precompiled: precompiled_charsmap is damaged")
    # a character takes up to four bytes
    return max(len(text) for text in content[4 + trie :].split(b"\0")) // 4


def _check_template(rule: dict[str, Any]) -> None:
    known = rule.get("special_tokens")
    for name in ("single", "pair"):
        around = 0
        for piece in rule.get(name) or ():
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if not isinstance(token, dict):
                continue
            special = known.get(token.get("id")) if isinstance(known, dict) else None
            if not isinstance(special, dict) or not isinstance(special.get("ids"), list):
                raise ValueError(f"TemplateProcessing: {name} names {str(token.get('id'))[:40]!r}, which is not there")
            around += len(special["ids"])
        if around > _MOST_AROUND:
            raise ValueError(
                f"TemplateProcessing: {name} puts {around:,} tokens around a text; allowed: {_MOST_AROUND}"
            )


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0
