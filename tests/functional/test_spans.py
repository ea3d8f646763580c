"""The best spans against an oracle that tries all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_lightning.functional.spans import best_spans, from_rows, to_rows
from tests.reference import squad as oracle


@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    length=st.integers(1, 7),
    longest=st.integers(1, 9),
    count=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_best_spans_of_all_windows(counts: list[int], length: int, longest: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sum(counts), length, 2, generator=generator)
    inside = torch.rand(sum(counts), length, generator=generator) < 0.7
    found = best_spans(scores, inside, {"sequences": torch.tensor(counts)}, longest, count)
    window = 0
    for row, windows in enumerate(counts):
        expected = []
        for number in range(window, window + windows):
            starts, ends = scores[number].T.tolist()
            expected += [(s, number, i, j) for s, i, j in oracle.spans(starts, ends, inside[number].tolist(), longest)]
        window += windows
        expected = sorted(expected, reverse=True)[:count]
        columns = (found.scores, found.windows, found.first, found.last)
        got = [column[row].tolist() for column in columns]
        assert got[0][: len(expected)] == pytest.approx([score for score, *_ in expected], rel=1e-6)
        assert list(zip(*got[1:], strict=True))[: len(expected)] == [tuple(place) for _, *place in expected]
        assert all(score == -math.inf for score in got[0][len(expected) :])
        assert set(got[1]) <= set(range(sum(counts))) and set(got[2] + got[3]) <= set(range(length))


def test_a_bonus_for_a_span_that_is_too_long_or_turned_round_does_not_count() -> None:
    scores = torch.zeros(1, 6, 2)
    scores[0, 1, 0] = scores[0, 5, 1] = 10.0  # five tokens
    scores[0, 0, 1] = 20.0  # ends before it starts, but for the first token
    inside, inputs = torch.ones(1, 6, dtype=torch.bool), {"sequences": torch.tensor([1])}
    inside[0, 0] = False
    assert best_spans(scores, inside, inputs, 5, 1).scores.tolist() == [[20.0]]
    assert best_spans(scores, inside, inputs, 4, 1).scores.tolist() == [[10.0]]


def test_windows_of_rows_there_and_back() -> None:
    inputs = {"sequences": torch.tensor([2, 1, 3])}
    values = torch.arange(12.0).view(6, 2)
    rows = to_rows(values, inputs, -1.0)
    assert rows[:, :, 0].tolist() == [[0, 2, -1], [4, -1, -1], [6, 8, 10]]
    assert_close(from_rows(rows.flatten(1), inputs, 2), values)
    padded = torch.cat([rows.flatten(1), torch.full((3, 2), 9.0)], dim=1)
    assert_close(from_rows(padded, inputs, 2), values)
