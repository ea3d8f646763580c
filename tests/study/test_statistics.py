"""Means and intervals against numbers worked out by hand and against scipy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_lightning.errors import UsageError
from peft_lightning.study.statistics import mean_interval, paired_interval

_VALUES = st.lists(st.floats(-1e3, 1e3).filter(lambda value: abs(value) > 1e-3), min_size=2, max_size=12)


def test_three_values_by_hand() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert interval.count == 3
    assert str(interval) == "2.000 ± 2.484"


@given(_VALUES, st.sampled_from([0.5, 0.9, 0.95]))
def test_equals_scipy(values: list[float], level: float) -> None:
    interval = mean_interval(values, level)
    deviation = stats.sem(values)
    if deviation < 1e-9:
        return
    low, high = stats.t.interval(level, len(values) - 1, loc=interval.mean, scale=deviation)
    assert interval.mean - interval.half_width == pytest.approx(low, rel=1e-6, abs=1e-9)
    assert interval.mean + interval.half_width == pytest.approx(high, rel=1e-6, abs=1e-9)


def test_one_value_has_no_interval() -> None:
    interval = mean_interval([0.5])
    assert math.isnan(interval.half_width)
    assert str(interval) == "0.500"


def test_a_pair_cancels_what_both_share() -> None:
    interval = paired_interval([1.1, 5.1, 9.1], [1.0, 5.0, 9.0])
    assert interval.mean == pytest.approx(0.1)
    assert interval.half_width == pytest.approx(0.0, abs=1e-12)


def test_no_values() -> None:
    with pytest.raises(UsageError, match="values is empty"):
        mean_interval([])


def test_level_out_of_range() -> None:
    with pytest.raises(UsageError, match="level is 1.0: it must lie between 0 and 1"):
        mean_interval([1.0, 2.0], level=1.0)


def test_pairs_of_unequal_length() -> None:
    with pytest.raises(UsageError, match="values has 1 entries and baseline 2"):
        paired_interval([1.0], [1.0, 2.0])
