"""What a few seeds say: a mean with its confidence interval.

Source: Student (1908), "The probable error of a mean". With n values of mean m and standard deviation s (its
denominator is n - 1) the interval is m +- t(n - 1) s / sqrt(n). It assumes seeds drawn independently; three
seeds give a wide interval, and that is the truth about three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peft_lightning.errors import UsageError

__all__ = ["Interval", "mean_interval", "paired_interval"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and half the width of its confidence interval (``nan`` for a single value)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return self.format()

    def format(self, digits: int = 3) -> str:
        """Return ``mean +- half width``, or the mean alone where one value gives no interval."""
        if math.isnan(self.half_width):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of ``values`` and its two-sided t interval.

    Raises UsageError for no values or a level outside (0, 1).

    >>> mean_interval([1.0, 2.0, 3.0]).format(2)
    '2.00 ± 2.48'
    """
    if not values:
        raise UsageError("values is empty: at least one value is needed for a mean")
    if not 0.0 < level < 1.0:
        raise UsageError(f"level is {level}: it must lie between 0 and 1, both excluded")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean=mean, half_width=math.nan, count=1)
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    width = float(t.ppf(0.5 + level / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean=mean, half_width=width, count=count)


def paired_interval(values: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean difference ``values - baseline``, seed by seed, and its t interval.

    Raises UsageError where the two differ in length.
    """
    if len(values) != len(baseline):
        raise UsageError(f"values has {len(values)} entries and baseline {len(baseline)}: pairs need equally many")
    return mean_interval([value - other for value, other in zip(values, baseline, strict=True)], level)
