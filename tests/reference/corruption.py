"""A slow oracle of the corruption: one token at a time, with Python's own whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

_ALL = 2**64


def mixed(x: int) -> int:
    """SplitMix64's output for the state ``x``."""
    x = (x + 0x9E3779B97F4A7C15) % _ALL
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _ALL
    return x ^ (x >> 31)


def drawn(key: Sequence[int], row: int, purpose: int, position: int) -> int:
    """The 64 bits for a token."""
    state = 0
    for part in (*key, row, purpose, position):
        state = mixed((state + part) % _ALL)
    return state


def corrupted(
    ids: list[int],
    targets: int,
    row: int,
    key: Sequence[int],
    mask_id: int,
    ordinary: set[int],
    starts: set[int] | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """The corrupted ids, the targets and the labels of one block."""
    ranks = []
    first = 0
    for position, token in enumerate(ids):
        first = position if starts is None or token in starts else first
        if token in ordinary:
            ranks.append((drawn(key, row, 1, first) >> 16, position))
    chosen = sorted(position for _, position in sorted(ranks)[:targets])
    shown, words = list(ids), sorted(ordinary)
    for position in chosen:
        fate = (drawn(key, row, 2, position) >> 11) / 2**53
        if fate < 0.8:
            shown[position] = mask_id
        elif fate < 0.9:
            shown[position] = words[int((drawn(key, row, 3, position) >> 11) / 2**53 * len(words))]
    return shown, chosen, [ids[position] for position in chosen]
