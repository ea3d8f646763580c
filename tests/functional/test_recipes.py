"""A recipe that cannot be is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peft_lightning.errors import UsageError
from peft_lightning.functional.recipes import PRESETS, Recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"align": "both"}, r"merge\.align = 'both': must be one of none, weights, activations"),
        ({"features": "up"}, r"merge\.features = 'up': must be one of down, all"),
        ({"metric": "cosine"}, r"merge\.metric = 'cosine'"),
        ({"solver": "lap"}, r"merge\.solver = 'lap'"),
        ({"marginals": "degree"}, r"merge\.marginals = 'degree'"),
        ({"combine": "dare"}, r"merge\.combine = 'dare': must be one of sum, average, ties, regmean, select"),
        ({"choice": "all"}, r"merge\.choice = 'all': must be one of energy, gain"),
        ({"repair": "all"}, r"merge\.repair = 'all'"),
        ({"masks": "all"}, r"merge\.masks = 'all'"),
        ({"reference": "last"}, r"merge\.reference = 'last': must be first, medoid or the number"),
        ({"reference": 0.5}, r"merge\.reference = 0\.5: must be of type"),
        ({"scale": "max"}, r"merge\.scale = 'max': must be mean, sum or a number"),
        ({"scale": float("nan")}, r"merge\.scale = nan: must be of type"),
        ({"regularisation": 0.0}, r"merge\.regularisation = 0\.0: must be above 0"),
        ({"ridge": -1.0}, r"merge\.ridge = -1\.0: must be above 0"),
        ({"density": 0.0}, r"merge\.density = 0\.0: must be above 0 and at most 1"),
        ({"shrink": 1.5}, r"merge\.shrink = 1\.5: must be from 0 to 1"),
        ({"combine": "select", "width": 0}, r"merge\.width = 0: must be at least 1"),
        ({"masks": "budget", "budget": 0}, r"merge\.budget = 0: must be at least 1"),
        ({"marginals": "importance"}, r"importance': merge\.solver must be emd or sinkhorn, not 'assignment'"),
        ({"combine": "select", "align": "weights"}, r"align = 'weights' must be none"),
        ({"width": 5}, r"merge\.width = 5: merge\.combine must be select, not 'average'"),
        ({"budget": 5}, r"merge\.budget = 5: merge\.masks must be budget, not 'union'"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**settings)


def test_needs_follow_from_the_stages() -> None:
    assert Recipe(align="activations", combine="regmean", repair="refit").needs == ("pre", "post", "refit")
    assert Recipe(align="weights", repair="refit").needs == ("refit",)
    assert replace(PRESETS["select"], repair="none").needs == ("post",)
