"""JSON that someone else wrote: a few bytes can promise gigabytes of values, which are counted before they are made."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["check_json_lines", "parse_json"]

_MOST_JSON = 1 << 27
_MOST_MEMORY, _TIMES = 1 << 29, 40
# Bytes of Python objects, at least, for each sign of JSON: a mapping, a list, a value.
_COSTS = {b"{": 232, b"[": 88, b",": 48, b":": 96}


def parse_json(content: bytes | str, *, once: bool = True) -> Any:
    """What a JSON text holds.

    Args:
        content: in UTF-8, if bytes.
        once: refuse a mapping that has a key twice, of which Python's own reader takes the last.

    Raises:
        ValueError: it is no JSON, too deep, or would need too much memory.
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(raw) > _MOST_JSON:
        raise ValueError(f"has {len(raw):,} bytes of JSON; allowed: {_MOST_JSON:,}")
    if len(raw) > 1 << 20 and _needed(raw) > _MOST_MEMORY:
        raise ValueError("is JSON that would need more than 512 MB as values")
    try:
        text = raw.decode("utf-8")
        return json.loads(text, object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None


def check_json_lines(content: bytes) -> None:
    """Compare what a file with a JSON text in each line would need as values with its length.

    Raises:
        ValueError: it would be too much.
    """
    most = max(_MOST_MEMORY, _TIMES * len(content))
    if len(content) > 1 << 20 and (needed := _needed(content)) > most:
        raise ValueError(f"is JSON that would need {needed:,} bytes as values; allowed for its length: {most:,}")


def _needed(raw: bytes) -> int:
    return len(raw) * 4 + sum(cost * raw.count(sign) for sign, cost in _COSTS.items())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"has the key {twice[:100]!r} twice")
    return found
