"""Settings refuse values of another type than their annotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from peft_lightning.checks import check_types
from peft_lightning.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field of each kind."""

    count: int = 1
    rate: float = 0.5
    on: bool = False
    name: str | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    extra: dict[str, Any] | None = None


@pytest.mark.parametrize(
    "values", [{}, {"rate": 1}, {"name": "x"}, {"pair": (1, 2.0)}, {"extra": {"a": object()}}, {"on": True}]
)
def test_what_fits(values: dict[str, Any]) -> None:
    check_types(Settings(**values), "group")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.0}, r"group.count = 1\.0: must be of type int"),
        ({"count": True}, "group.count = True: must be of type int"),
        ({"rate": "1"}, "group.rate = '1': must be of type float"),
        ({"rate": float("nan")}, "group.rate = nan: must be of type float, and finite"),
        ({"rate": None}, "group.rate = None: must be of type float"),
        ({"on": 1}, "group.on = 1: must be of type bool"),
        ({"name": 1}, r"group.name = 1: must be of type str \| None"),
        ({"pair": (1.0,)}, r"group.pair = \(1\.0,\): must be of type tuple"),
        ({"pair": (1.0, "x")}, "group.pair"),
        ({"extra": [1]}, r"group.extra = \[1\]: must be of type dict"),
    ],
)
def test_what_does_not(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_types(Settings(**values), "group")
