"""The checks of options that the data modules share; the modules themselves have tests of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_lightning.data.module import share, switch, within
from peft_lightning.errors import UsageError


@pytest.mark.parametrize("value", [True, 2.0, 2.5, "2", None, [2], np.float64(2), np.True_])
def test_no_whole_number(value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        within("size", value, 1)
    assert str(caught.value) == f"size is {value!r}; allowed: a whole number, at least 1"
    with pytest.raises(UsageError, match="allowed: a whole number, from 1 to 3$"):
        within("size", value, 1, 3)


def test_whole_numbers() -> None:
    assert [within("size", value, 1, 3) for value in (1, 2, 3)] == [1, 2, 3]
    assert type(within("size", np.int64(2), 1)) is int
    for value in (0, 4):
        with pytest.raises(UsageError, match=f"^size is {value}; allowed: from 1 to 3$"):
            within("size", value, 1, 3)


@pytest.mark.parametrize("value", [True, False, "0.5", None, 1j, [0.5]])
def test_no_number(value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        share("rate", value)
    assert str(caught.value) == f"rate is {value!r}; allowed: a number between 0 and 1, without these"


def test_shares() -> None:
    assert share("rate", 0.25) == 0.25 and type(share("rate", np.float32(0.25))) is float
    for value in (0, 1, -0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="^rate is .*; allowed: between 0 and 1, without these$"):
            share("rate", value)


def test_switches() -> None:
    assert switch("on", True) is True and switch("on", False) is False
    for value in (1, 0, "false", None):
        with pytest.raises(UsageError) as caught:
            switch("on", value)
        assert str(caught.value) == f"on is {value!r}; allowed: true or false"
