"""The bootstrap against every draw there is, its coverage in simulations, and Holm against his procedure."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_lightning.errors import UsageError
from peft_lightning.study.resampling import Estimate, bootstrap, f1, holm, pearson
from tests.reference import resampling as oracle

# no lattice, on which a percentile may jump
_FIRST = [[0.91, 0.12, 0.83], [0.74, 0.65, 0.56], [0.07, 0.28, 0.99]]
_SECOND = [[0.11, 0.32, 0.43], [0.64, 0.05, 0.16], [0.37, 0.88, 0.59]]
_MANY = 200_000


def _expected(draws: list[float], interval: str, value: float, level: float = 0.8) -> tuple[float, float]:
    if interval == "percentile":
        return tuple(np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2]))
    width = stats.t.ppf(0.5 + level / 2, 2) * np.std(draws) * math.sqrt(3 / 2)
    return value - width, value + width


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("interval", ["t", "percentile"])
@pytest.mark.parametrize("second", [None, _SECOND])
def test_as_going_through_every_draw(same: bool, interval: str, second: Any) -> None:
    examples = 3 if same else 2  # one more, and there are half a million draws
    first, other = ([row[:examples] for row in rows] for rows in (_FIRST, second or np.zeros((3, 3)).tolist()))
    draws = (oracle.crossed if same else oracle.nested)(3, examples, oracle.mean_difference(first, other))
    options: dict[str, Any] = {"same_examples": same, "interval": interval, "replicates": _MANY, "level": 0.8}
    found = bootstrap(first, None if second is None else other, **options)
    value = float(np.mean(first) - np.mean(other))
    assert found.value == pytest.approx(value)
    assert (found.low, found.high) == pytest.approx(_expected(draws, interval, value), abs=0.01)
    if interval == "percentile":
        below, above = (np.mean([side * x <= 1e-12 for x in draws]) for side in (1, -1))
        assert found.p == pytest.approx(min(1.0, 2 * min(below, above)), abs=0.01)


@pytest.mark.parametrize("same", [True, False])
def test_a_metric_is_taken_of_what_was_drawn(same: bool) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 3, 4))
    truths = rng.normal(size=4) if same else rng.normal(size=(3, 4))

    def score(split: int, drawn: Any) -> float:
        drawn = list(drawn)
        truth = truths[drawn] if same else truths[split][drawn]
        return float(pearson(first[split][drawn], truth) - pearson(second[split][drawn], truth))

    if same:
        draws = oracle.crossed(3, 4, score)
    else:  # every draw of 4 of 4 for each of 3 splits is too many: single splits, three at random
        each = [score(split, drawn) for split in range(3) for drawn in product(range(4), repeat=4)]
        draws = list(rng.choice(each, (_MANY, 3)).mean(1))
    options: dict[str, Any] = {"truths": truths, "metric": pearson, "same_examples": same}
    found = bootstrap(first, second, **options, interval="percentile", replicates=_MANY, level=0.8)
    assert found.value == pytest.approx(np.mean([score(split, range(4)) for split in range(3)]))
    assert (found.low, found.high) == pytest.approx(_expected(draws, "percentile", 0.0), abs=0.02)


def test_a_mean_as_a_metric_is_the_mean() -> None:
    def right(predictions: Any, truths: Any) -> Any:
        return (predictions == truths).mean(-1)

    rng = np.random.default_rng(0)
    first, second = rng.integers(2, size=(2, 6, 40))
    truths = rng.integers(2, size=40)
    for same in (True, False):
        options: dict[str, Any] = {"same_examples": same, "replicates": 40_000}
        plain = bootstrap(first == truths, second == truths, **options)
        shown = bootstrap(first, second, truths=truths, metric=right, **options)
        assert (shown.value, shown.low, shown.p) == pytest.approx((plain.value, plain.low, plain.p), abs=4e-3)


def _covered(splits: int, interval: str, spreads: tuple[float, float, float], same: bool = True) -> tuple[float, float]:
    """How often the interval covers the truth, and how often a truth of 0 is rejected at 5 %."""
    rng, trials, hits, rejections = np.random.default_rng(3), 400, 0, 0
    for trial in range(trials):
        of_split, of_example, rest = (
            spread * rng.normal(size=shape)
            for spread, shape in zip(spreads, [(splits, 1), (1, 40), (splits, 40)], strict=True)
        )
        difference = of_split + of_example + rest
        found = bootstrap(difference, same_examples=same, interval=interval, replicates=400, seed=trial)
        hits += found.low <= 0 <= found.high
        rejections += found.p < 0.05
    return hits / trials, rejections / trials


@pytest.mark.parametrize("splits", [3, 10])
@pytest.mark.parametrize("spreads", [(1.0, 0.0, 1.0), (0.3, 1.0, 1.0)])
def test_the_interval_covers_as_often_as_it_says(splits: int, spreads: tuple[float, float, float]) -> None:
    covered, rejected = _covered(splits, "t", spreads)
    # 0.95 less three standard errors of 400 trials; above it is allowed, as the top of the file says
    assert covered >= 0.918
    assert rejected == pytest.approx(1 - covered)


def test_with_examples_of_their_own() -> None:
    covered, _ = _covered(10, "t", (0.5, 0.0, 2.0), same=False)
    assert 0.918 <= covered <= 0.99


def test_percentiles_of_few_splits_cover_too_little() -> None:
    assert _covered(4, "percentile", (1.0, 0.0, 0.3))[0] < 0.88


def test_examples_drawn_once_for_all_splits_do_not_average_out() -> None:
    """Two hundred splits with the same answers know no more than one about other examples."""
    difference = np.tile(np.random.default_rng(0).normal(size=(1, 50)), (200, 1))
    once, each = (bootstrap(difference, same_examples=same, replicates=2000) for same in (True, False))
    alone = bootstrap(difference[:1], replicates=2000)
    assert once.high - once.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert each.high - each.low < 0.2 * (once.high - once.low)


def test_methods_are_paired() -> None:
    rng = np.random.default_rng(5)
    hard = rng.normal(size=(1, 100)) + rng.normal(size=(8, 1))
    found = bootstrap(hard + 0.1, hard, replicates=500)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert found.p == 0.0
    assert bootstrap(hard, replicates=500).high - bootstrap(hard, replicates=500).low > 0.5


def test_a_seed_repeats_and_the_other_way_round_is_the_negative() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.integers(2, size=(2, 5, 30))
    found = bootstrap(first, second, replicates=300, seed=7)
    assert found == bootstrap(first, second, replicates=300, seed=7)
    assert found != bootstrap(first, second, replicates=300, seed=8)
    turned = bootstrap(second, first, replicates=300, seed=7)
    assert (turned.value, turned.low, turned.p) == pytest.approx((-found.value, -found.high, found.p))


@pytest.mark.parametrize("interval", ["t", "percentile"])
def test_equal_predictions(interval: str) -> None:
    right = np.random.default_rng(0).integers(2, size=(4, 20))
    found = bootstrap(right, right, interval=interval, replicates=200)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_one_split_draws_examples_alone() -> None:
    right = [[1.0] * 30 + [0.0] * 10]
    found = bootstrap(right, replicates=50_000)
    error = math.sqrt(0.75 * 0.25 / 39)
    assert (found.splits, found.examples) == (1, 40)
    assert found.high == pytest.approx(0.75 + stats.t.ppf(0.975, 39) * error, abs=2e-3)


def test_one_example_draws_splits_alone() -> None:
    found = bootstrap([[1.0], [2.0], [3.0]], replicates=50_000)
    # Student's interval of three values
    assert (found.low, found.high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=0.02)


def test_one_number_has_no_interval() -> None:
    found = bootstrap([[0.5]], replicates=100)
    assert found.value == 0.5
    assert math.isnan(found.low) and math.isnan(found.high)
    assert found.p == 1.0


def test_chunks_do_not_change_what_a_replicate_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    first = rng.integers(2, size=(5, 30))
    whole = bootstrap(first, replicates=20_000)
    monkeypatch.setattr("peft_lightning.study.resampling._CELLS", 1000)
    parts = bootstrap(first, replicates=20_000)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=5e-3)


def test_pearson_as_scipy_and_zero_for_a_constant() -> None:
    rng = np.random.default_rng(0)
    predictions, truths = rng.normal(size=(2, 3, 50))
    for found, left, right in zip(pearson(predictions, truths), predictions, truths, strict=True):
        assert found == pytest.approx(stats.pearsonr(left, right).statistic)
    assert pearson(np.full((2, 50), 0.1), truths[:2]).tolist() == [0.0, 0.0]


def test_f1_by_hand() -> None:
    truths = np.array([1, 1, 1, 0, 0])
    assert f1(np.array([1, 1, 0, 1, 0]), truths) == pytest.approx(2 * 2 / (3 + 3))
    assert f1(np.zeros((2, 5)), np.zeros(5)).tolist() == [0.0, 0.0]


@given(st.lists(st.integers(0, 1000).map(lambda k: k / 1000), max_size=7))
def test_holm_is_the_level_at_which_he_rejects(values: list[float]) -> None:
    p_values = {f"task{number}": value for number, value in enumerate(values)}
    corrected = holm(p_values)
    assert list(corrected) == list(p_values)
    for alpha in (0.0005, 0.01, 0.05, 0.2, 0.5, 0.9):
        assert {name for name, p in corrected.items() if p <= alpha} == oracle.rejected(p_values, alpha)


def test_format() -> None:
    estimate = Estimate(value=0.8125, low=0.79, high=0.8401, p=0.02, splits=10, examples=500)
    assert estimate.format() == "81.2 [79.0, 84.0]"
    assert estimate.format(3, 1.0) == "0.812 [0.790, 0.840]"


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"first": [1.0, 2.0]}, r"first has the shape \(2,\): it must be finite numbers \[splits, examples\]"),
        ({"first": [[1.0, math.nan]]}, "first has the shape"),
        ({"second": [[1.0, 0.0, 1.0]]}, r"the shapes \(1, 2\) and \(1, 3\): pairs need equal ones"),
        ({"metric": pearson}, "truths and metric go together"),
        ({"truths": [1, 2]}, "truths and metric go together"),
        ({"metric": pearson, "truths": [1.0]}, r"truths has the shape \(1,\): it must be \(2,\)"),
        ({"interval": "normal"}, "interval is 'normal': it must be t or percentile"),
        ({"replicates": 99}, "replicates is 99: it must be at least 100"),
        ({"level": 1.0}, "level is 1.0: it must lie between 0 and 1"),
    ],
)
def test_what_is_refused(given_values: dict[str, Any], message: str) -> None:
    first = given_values.pop("first", [[1.0, 0.0]])
    with pytest.raises(UsageError, match=message):
        bootstrap(first, **given_values)


def test_a_p_value_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"p_values\['b'\] is 1.5: it must be from 0 to 1"):
        holm({"a": 0.1, "b": 1.5})
