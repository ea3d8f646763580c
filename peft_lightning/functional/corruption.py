"""Dynamic masking for masked language models (Devlin et al., 2019, section 3.1) as a pure function of a block's place.

https://arxiv.org/abs/1810.04805. Of each block exactly P ordinary tokens become targets, so that shapes never change
(the paper draws each token by itself, so its number of targets varies). A target is shown as [MASK] with probability
0.8, as a random ordinary word with 0.1, and unchanged with 0.1.

All draws are hashes of (key, row, position), so a block's masks depend neither on how a batch is split over processes
nor on what was drawn before.

Shapes: B blocks, S tokens of a block, P targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peft_lightning.errors import DataError

__all__ = ["MOST_POSITIONS", "Corrupted", "corrupt", "uniform"]

# Positions take the lowest bits of a sorting key.
_POSITION_BITS = 16
MOST_POSITIONS = 2**_POSITION_BITS
_MASKED, _MASKED_OR_RANDOM = 0.8, 0.9
# What a draw is for.
_ORDER, _FATE, _WORD, _FREE = range(1, 5)


class Corrupted(NamedTuple):
    """A corrupted batch, int64.

    Attributes:
        ids: [B, S] what the model sees.
        targets: [B, P] positions that it predicts, ascending.
        labels: [B, P] what stood there.
    """

    ids: np.ndarray
    targets: np.ndarray
    labels: np.ndarray


def uniform(rows_B: np.ndarray, length: int, key: Sequence[int]) -> np.ndarray:
    """Return numbers in [0, 1), float32 [B, length], that are the same for the same arguments on any machine.

    They are independent of what :func:`corrupt` draws for the same key.

    >>> uniform(np.arange(3), 4, (1, 2))[2:].tolist() == uniform(np.array([2]), 4, (1, 2)).tolist()
    True
    """
    bits = _bits(_states(rows_B, key), _FREE, np.arange(length, dtype=np.uint64)[None])
    # As many bits as the type holds: more would be rounded, now and then up to 1.
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def corrupt(
    ids_BS: np.ndarray,
    targets: int,
    rows_B: np.ndarray,
    key: Sequence[int],
    *,
    mask_id: int,
    ordinary_V: np.ndarray,
    starts_V: np.ndarray | None = None,
) -> Corrupted:
    """Choose the targets of each block and corrupt them.

    Args:
        ids_BS: whole numbers.
        targets: P, from 1 to S.
        rows_B: with ``key`` what the draws follow from: the block's row in the global batch, or its number.
        key: seed, step, or whatever else tells draws apart.
        mask_id: number of [MASK].
        ordinary_V: bool, which words may be targets and replacements: all but the special ones.
        starts_V: bool, which words start a word rather than continue the one before; then whole words are chosen, and
            of the last one only as many pieces, from its first on, as make the number of targets exact. None: each
            token is chosen by itself.

    Raises:
        DataError: a block has fewer than P ordinary tokens.
    """
    ordinary_BS = ordinary_V[ids_BS]
    if (fewest := int(ordinary_BS.sum(1).min())) < targets:
        raise DataError(f"a block has {fewest} ordinary tokens for {targets} targets; allowed: at least as many")
    positions = np.arange(ids_BS.shape[1], dtype=np.uint64)
    states = _states(rows_B, key)
    order_BS = _bits(states, _ORDER, positions[None])
    if starts_V is not None:
        order_BS = _of_first_piece(order_BS, starts_V[ids_BS])
    # With the position in the lowest bits no two are equal, so any way to sort gives the same.
    shift = np.uint64(_POSITION_BITS)
    order_BS = np.where(ordinary_BS, order_BS >> shift << shift | positions, np.uint64(2**64 - 1))
    chosen_BP = np.sort(np.argpartition(order_BS, targets - 1, axis=1)[:, :targets], axis=1)
    labels_BP = np.take_along_axis(ids_BS, chosen_BP, 1).astype(np.int64)
    fate_BP = _fractions(_bits(states, _FATE, chosen_BP.astype(np.uint64)))
    words = np.flatnonzero(ordinary_V)
    random_BP = words[(_fractions(_bits(states, _WORD, chosen_BP.astype(np.uint64))) * len(words)).astype(np.int64)]
    shown_BP = np.where(fate_BP < _MASKED, mask_id, np.where(fate_BP < _MASKED_OR_RANDOM, random_BP, labels_BP))
    ids = ids_BS.astype(np.int64)
    np.put_along_axis(ids, chosen_BP, shown_BP, 1)
    return Corrupted(ids, chosen_BP.astype(np.int64), labels_BP)


def _of_first_piece(order_BS: np.ndarray, starts_BS: np.ndarray) -> np.ndarray:
    """Give all pieces of a word the draw of its first one."""
    first_BS = np.where(starts_BS, np.arange(order_BS.shape[1]), 0)
    return np.take_along_axis(order_BS, np.maximum.accumulate(first_BS, axis=1), 1)


def _states(rows_B: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Return a state per row, uint64 [B]."""
    # Arrays wrap round silently, single numbers do not.
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part % 2**64))
    return _mix(state + rows_B.astype(np.uint64))


def _bits(states_B: np.ndarray, purpose: int, positions_BN: np.ndarray) -> np.ndarray:
    """Return 64 random bits per row and position, uint64 [B, N]."""
    return _mix(_mix(states_B + np.uint64(purpose))[:, None] + positions_BN)


def _fractions(bits: np.ndarray) -> np.ndarray:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al., 2014, https://doi.org/10.1145/2660193.2660195): a state's next output."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
