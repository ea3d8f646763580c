"""Masking: against a slow oracle, and by its statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_lightning.errors import DataError
from peft_lightning.functional.corruption import Corrupted, corrupt, uniform
from tests.reference.corruption import corrupted, drawn, mixed

MASK, WORDS = 3, 40
# 0 to 4 are special, and so is 17; 20 is no token at all.
ORDINARY = np.array([token > 4 and token not in (17, 20) for token in range(WORDS)])
STARTS = np.array([not (token % 3 == 0 and ORDINARY[token]) for token in range(WORDS)])


def blocks(count: int, length: int, seed: int = 0) -> np.ndarray:
    """Random blocks [B, S] in which about a tenth of the tokens are special."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(np.flatnonzero(ORDINARY), (count, length))
    ids[rng.random(ids.shape) < 0.1] = 2
    return ids.astype(np.int32)


def corrupt_all(ids: np.ndarray, targets: int, key: tuple[int, ...] = (1, 2), **options: Any) -> Corrupted:
    """Corrupt blocks whose rows are numbered from 0."""
    options = {"mask_id": MASK, "ordinary_V": ORDINARY, **options}
    return corrupt(ids, targets, np.arange(len(ids)), key, **options)


# -- against the oracle


@given(
    count=st.integers(1, 4),
    length=st.integers(1, 30),
    seed=st.integers(0, 99),
    key=st.lists(st.integers(0, 2**64 - 1), max_size=3).map(tuple),
    whole=st.booleans(),
    data=st.data(),
)
def test_equals_one_token_at_a_time(
    count: int, length: int, seed: int, key: tuple[int, ...], whole: bool, data: st.DataObject
) -> None:
    ids = blocks(count, length, seed)
    fewest = int(ORDINARY[ids].sum(1).min())
    if not fewest:
        return
    targets = data.draw(st.integers(1, fewest))
    got = corrupt_all(ids, targets, key, starts_V=STARTS if whole else None)
    ordinary, starts = set(np.flatnonzero(ORDINARY).tolist()), set(np.flatnonzero(STARTS).tolist())
    expected = [
        corrupted(row, targets, number, key, MASK, ordinary, starts if whole else None)
        for number, row in enumerate(ids.tolist())
    ]
    assert [list(part) for part in zip(*(values.tolist() for values in got), strict=True)] == [
        list(row) for row in expected
    ]
    assert all(values.dtype == np.int64 for values in got)


def test_uniform_equals_one_number_at_a_time() -> None:
    got = uniform(np.array([5, 0, 2**40]), 7, (9, 0))
    expected = [[(drawn((9, 0), row, 4, position) >> 40) / 2**24 for position in range(7)] for row in (5, 0, 2**40)]
    assert got.dtype == np.float32 and got.tolist() == expected


def test_the_oracle_mixes_as_published() -> None:
    # The first outputs of SplitMix64 for the seed 1234567, as in Rosetta Code and the tests of other libraries.
    golden, state, outputs = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        outputs.append(mixed(state))
        state = (state + golden) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# -- what decides


def test_a_row_does_not_depend_on_its_batch() -> None:
    ids = blocks(6, 32)
    whole = corrupt_all(ids, 5)
    rows = np.array([4, 1])
    part = corrupt(ids[rows], 5, rows, (1, 2), mask_id=MASK, ordinary_V=ORDINARY)
    for ours, theirs in zip(part, whole, strict=True):
        assert ours.tolist() == theirs[rows].tolist()


def test_key_and_row_decide() -> None:
    ids = np.repeat(blocks(1, 64), 50, axis=0)
    seen = {tuple(row) for key in [(1, 2), (2, 1), (1, 3), (1,), ()] for row in corrupt_all(ids, 8, key).targets}
    assert len(seen) == 250
    noise = {tuple(row) for key in [(1, 2), (2, 1)] for row in uniform(np.arange(50), 8, key)}
    assert len(noise) == 100


# -- statistics


def test_shares_of_the_three_fates() -> None:
    ids = blocks(4000, 64)
    got = corrupt_all(ids, 10)
    shown = np.take_along_axis(got.ids, got.targets, 1)
    masked, kept = shown == MASK, shown == got.labels
    other = ~masked & ~kept
    # A random word is now and then the same one.
    words = int(ORDINARY.sum())
    expected = np.array([0.8, 0.1 + 0.1 / words, 0.1 * (words - 1) / words]) * shown.size
    observed = np.array([masked.sum(), kept.sum(), other.sum()])
    assert stats.chisquare(observed, expected).pvalue > 0.01
    counts = np.bincount(shown[other], minlength=WORDS)
    assert not counts[~ORDINARY].any(), "a special token as a random word"
    assert stats.chisquare(counts[ORDINARY]).pvalue > 0.01


def test_positions_are_uniform_and_independent_of_fates() -> None:
    ids = np.full((8000, 40), 7)
    got = corrupt_all(ids, 6)
    assert stats.chisquare(np.bincount(got.targets.ravel(), minlength=40)).pvalue > 0.01
    masked = np.take_along_axis(got.ids, got.targets, 1) == MASK
    table = np.array([np.bincount(got.targets[chosen], minlength=40) for chosen in (masked, ~masked)])
    assert stats.chi2_contingency(table).pvalue > 0.01
    # Neighbouring rows and steps are as different as any.
    following = corrupt_all(ids, 6, (1, 3)).targets
    for other in (following, np.roll(got.targets, 1, axis=0)):
        common = np.mean([len(set(a) & set(b)) for a, b in zip(got.targets.tolist(), other.tolist(), strict=True)])
        assert common == pytest.approx(6 * 6 / 40, abs=0.05)


def test_noise_is_uniform_and_independent_of_targets() -> None:
    noise = uniform(np.arange(2000), 50, (1, 2))
    assert 0 <= noise.min() and noise.max() < 1
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 0.01
    targets = corrupt_all(np.full((2000, 50), 7), 10).targets
    assert stats.kstest(np.take_along_axis(noise, targets, 1).ravel(), "uniform").pvalue > 0.01


@given(length=st.integers(8, 40), seed=st.integers(0, 99), targets=st.integers(1, 4))
def test_exactly_the_targets_change(length: int, seed: int, targets: int) -> None:
    ids = blocks(5, length, seed)
    if ORDINARY[ids].sum(1).min() < targets:
        return
    got = corrupt_all(ids, targets)
    assert got.targets.shape == got.labels.shape == (5, targets)
    assert (np.diff(got.targets, axis=1) > 0).all()
    assert ORDINARY[got.labels].all()
    restored = got.ids.copy()
    np.put_along_axis(restored, got.targets, got.labels, 1)
    assert restored.tolist() == ids.tolist()
    others = np.ones(ids.shape, bool)
    np.put_along_axis(others, got.targets, False, 1)
    assert (got.ids == ids)[others].all()


# -- whole words


def test_whole_words_are_chosen_together() -> None:
    # Words of one to three pieces: 6 and 9 continue.
    ids = np.tile(np.array([1, 7, 8, 6, 10, 6, 9, 2, 11, 13, 6, 2]), (300, 1))
    words = [{1}, {2, 3}, {4, 5, 6}, {8}, {9, 10}]
    sizes = set()
    for row in corrupt_all(ids, 4, starts_V=STARTS).targets.tolist():
        chosen = set(row)
        cut = [word & chosen for word in words if word & chosen and not word <= chosen]
        assert len(cut) <= 1, "more than the last word is cut"
        assert all(min(word) in chosen for word in words if word & chosen), "a word is cut at its start"
        sizes.add(len(cut))
    assert sizes == {0, 1}


def test_whole_words_are_chosen_uniformly() -> None:
    ids = np.tile(np.array([7, 6, 6, 8, 10, 6, 11, 13]), (6000, 1))
    (first,) = corrupt_all(ids, 1, starts_V=STARTS).targets.T
    counts = np.bincount(first, minlength=8)
    assert not counts[[1, 2, 5]].any()
    assert stats.chisquare(counts[[0, 3, 4, 6, 7]]).pvalue > 0.01


# -- bad input


def test_too_few_words() -> None:
    ids = np.array([[7, 8, 9], [7, 2, 2]])
    with pytest.raises(DataError, match="a block has 1 ordinary tokens for 2 targets; allowed: at least as many"):
        corrupt_all(ids, 2)
    assert corrupt_all(ids, 1).targets[1].tolist() == [0]
