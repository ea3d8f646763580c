"""Weights of either sign, TIES, RegMean and masks, against loops and plain least squares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.combining import combine, mean_factor, output_weights, prune, ties
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.functional.recipes import Recipe
from tests.reference.merging import inner, loop_ties, output

WIDTH, SIZE = 7, 5


def _adapter(seed: int) -> Bottleneck:
    g = torch.Generator().manual_seed(seed)
    shapes = ((SIZE, WIDTH), (SIZE,), (WIDTH, SIZE), (WIDTH,))
    down, bias, up, up_bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return Bottleneck(down, bias, up, up_bias)


def _inputs(tokens: int = 60, seed: int = 99) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _all(count: int) -> Tensor:
    return torch.ones(count, SIZE, dtype=torch.bool)


def _alike(seed: int, base: int = 0) -> Bottleneck:
    """Neurons of one adapter with outputs of another."""
    one, other = _adapter(base), _adapter(seed)
    return replace(one, up_DR=other.up_DR, up_bias_D=other.up_bias_D)


# -- weights -----------------------------------------------------------------------------------------------------


@given(weights=st.lists(st.floats(0.1, 9), min_size=1, max_size=5), factor=st.floats(0.01, 3) | st.floats(-3, -0.01))
def test_factors_of_the_outputs(weights: list[float], factor: float) -> None:
    assert output_weights(weights, "sum") == weights
    assert sum(output_weights(weights, "mean")) == pytest.approx(1)
    assert sum(output_weights(weights, factor)) == pytest.approx(factor)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [float("nan")], [float("inf"), 1.0], [1e39]])
def test_weights_that_say_nothing(weights: list[float]) -> None:
    with pytest.raises(UsageError, match=r"merge\.weights = .*: must be finite in float32, and not all zero"):
        output_weights(weights, "sum")


@given(weights=st.lists(st.floats(0.1, 9), min_size=1, max_size=5), signs=st.integers(0, 31))
def test_no_scale_turns_a_sign(weights: list[float], signs: int) -> None:
    signed = [-weight if signs >> place & 1 else weight for place, weight in enumerate(weights)]
    for scale in ("sum", "mean", 2.0):
        outputs = output_weights(signed, scale)
        assert [v > 0 for v in outputs] == [w > 0 for w in signed]
        assert sum(map(abs, outputs)) == pytest.approx({"sum": sum(weights), "mean": 1, 2.0: 2}[scale])


@pytest.mark.parametrize("scale", ["mean", 0.5])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, -0.5]])
def test_sum_at_another_scale_is_the_average(scale: str | float, weights: list[float]) -> None:
    pair = [_adapter(0), _adapter(1)]
    got = combine(pair, _all(2), weights, Recipe(combine="sum", scale=scale))
    wanted = combine(pair, _all(2), weights, Recipe(scale=scale))
    assert_close(output(got, _inputs()), output(wanted, _inputs()))


def test_sum_of_one_negative_weight_negates_the_function() -> None:
    got = combine([_adapter(0)], _all(1), [-1.0], Recipe(combine="sum", scale="sum"))
    assert_close(output(got, _inputs()), -output(_adapter(0), _inputs()))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [2.0, -0.5], [-1.0, -1.0]])
def test_a_negative_weight_subtracts_the_function(weights: list[float]) -> None:
    pair = [_adapter(0), _alike(1)]
    got = combine(pair, _all(2), weights, Recipe(scale="sum"))
    wanted = weights[0] * output(pair[0], _inputs()) + weights[1] * output(pair[1], _inputs())
    assert_close(output(got, _inputs()), wanted)


def test_one_adapter_of_weight_minus_1_is_negated() -> None:
    got = combine([_adapter(0)], _all(1), [-1.0], Recipe(scale="sum"))
    assert_close(output(got, _inputs()), -output(_adapter(0), _inputs()))


def test_slots_are_averaged_over_their_owners_by_weight() -> None:
    pair = [_adapter(0), _adapter(1)]
    owned = _all(2)
    owned[1, 3:] = False
    empty = replace(
        pair[1],
        down_RD=pair[1].down_RD * owned[1][:, None],
        down_bias_R=pair[1].down_bias_R * owned[1],  # type: ignore[operator]
        up_DR=pair[1].up_DR * owned[1],
    )
    got = combine([pair[0], empty], owned, [3.0, 1.0], Recipe())
    assert_close(got.down_RD[:3], 0.75 * pair[0].down_RD[:3] + 0.25 * pair[1].down_RD[:3])
    assert_close(got.down_RD[3:], pair[0].down_RD[3:])
    assert_close(got.up_DR[:, 3:], 0.75 * pair[0].up_DR[:, 3:])


def test_a_slot_of_which_all_owners_weigh_nothing() -> None:
    owned = _all(2)
    owned[1] = False
    got = combine([_adapter(0), _adapter(1)], owned, [0.0, 1.0], Recipe())
    assert_close(got.down_RD, _adapter(0).down_RD)


# -- TIES --------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 4), density=st.floats(0.05, 1), seed=st.integers(0, 999), negative=st.booleans())
def test_ties_equals_a_loop(count: int, density: float, seed: int, negative: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(count)]
    weights = [0.5 + i for i in range(count)]
    if negative:
        weights[0] = -weights[0]
    assert_close(ties(values, weights, density), loop_ties(values, weights, density))


def test_ties_of_copies_is_the_trimmed_tensor() -> None:
    value = torch.tensor([1.0, -5.0, 3.0, -2.0])
    assert ties([value] * 3, [1.0] * 3, 0.5).tolist() == [0, -5, 3, 0]


def test_ties_changes_the_up_projection_only() -> None:
    pair = [_adapter(0), _adapter(1)]
    got = combine(pair, _all(2), [1.0, 1.0], Recipe(combine="ties", density=0.4))
    plain = combine(pair, _all(2), [1.0, 1.0], Recipe())
    assert_close(got.down_RD, plain.down_RD)
    assert_close(got.up_DR, loop_ties([pair[0].up_DR, pair[1].up_DR], [1.0, 1.0], 0.4))


@pytest.mark.parametrize(("scale", "factor"), [("mean", 1.0), ("sum", 3.5), (0.3, 0.3)])
def test_the_scale_of_a_mean_that_knows_signs(scale: str | float, factor: float) -> None:
    assert mean_factor([2.0, -1.5], scale) == factor
    pair = [_adapter(0), _adapter(1)]
    one = combine(pair, _all(2), [2.0, -1.5], Recipe(combine="ties", scale="mean"))
    got = combine(pair, _all(2), [2.0, -1.5], Recipe(combine="ties", scale=scale))
    assert_close(got.up_DR, factor * one.up_DR)


# -- RegMean -----------------------------------------------------------------------------------------------------


def _grams(adapters: list[Bottleneck], seeds: tuple[int, ...]) -> list[Tensor]:
    grams = []
    for adapter, seed in zip(adapters, seeds, strict=True):
        z = inner(adapter, _inputs(seed=seed)).relu()
        grams.append(z.t() @ z / len(z))
    return grams


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 0.5], [2.0, -0.5]])
def test_regmean_is_the_least_squares_solution(weights: list[float]) -> None:
    pair = [_adapter(0), _adapter(1)]
    recipe = Recipe(combine="regmean", shrink=1.0, ridge=1e-12)
    got = combine(pair, _all(2), weights, recipe, _grams(pair, (1, 2)))
    rows, targets = [], []
    for adapter, seed, weight in zip(pair, (1, 2), weights, strict=True):
        z = inner(adapter, _inputs(seed=seed)).relu()
        rows.append(z * abs(weight) ** 0.5)
        targets.append(z @ adapter.up_DR.t() * weight / abs(weight) ** 0.5)
    z, y = torch.cat(rows), torch.cat(targets)
    assert_close(got.up_DR, torch.linalg.lstsq(z, y).solution.t(), atol=1e-7, rtol=1e-6)


def test_regmean_of_copies_is_the_adapter() -> None:
    copies = [_adapter(0)] * 3
    got = combine(copies, _all(3), [1.0] * 3, Recipe(combine="regmean"), _grams(copies, (1, 2, 3)))
    assert_close(output(got, _inputs()), output(copies[0], _inputs()))


def test_regmean_without_other_products_than_squares_weighs_each_neuron() -> None:
    pair = [_adapter(0), _adapter(1)]
    grams = _grams(pair, (1, 2))
    got = combine(pair, _all(2), [1.0, 1.0], Recipe(combine="regmean", shrink=0.0, ridge=1e-12), grams)
    energy = [gram.diagonal() for gram in grams]
    assert_close(got.up_DR, (pair[0].up_DR * energy[0] + pair[1].up_DR * energy[1]) / (energy[0] + energy[1]))


def test_regmean_of_the_down_projection() -> None:
    pair = [_adapter(0), _adapter(1)]
    inputs = [_inputs(seed=1), _inputs(seed=2) * torch.linspace(0.1, 3, WIDTH, dtype=torch.float64)]
    recipe = Recipe(combine="regmean", shrink=1.0, ridge=1e-12)
    grams = [x.t() @ x / len(x) for x in inputs]
    got = combine(pair, _all(2), [1.0, 1.0], recipe, _grams(pair, (1, 2)), grams)
    y = torch.cat([x @ a.down_RD.t() for x, a in zip(inputs, pair, strict=True)])
    assert_close(got.down_RD, torch.linalg.lstsq(torch.cat(inputs), y).solution.t(), atol=1e-7, rtol=1e-6)
    same = combine(pair, _all(2), [1.0, 1.0], recipe, _grams(pair, (1, 2)), [grams[0]] * 2)
    assert_close(same.down_RD, (pair[0].down_RD + pair[1].down_RD) / 2)


def test_regmean_of_neurons_that_were_never_active_is_the_mean() -> None:
    pair = [_adapter(0), _adapter(1)]
    got = combine(pair, _all(2), [1.0, 1.0], Recipe(combine="regmean"), [torch.zeros(SIZE, SIZE).double()] * 2)
    assert_close(got.up_DR, (pair[0].up_DR + pair[1].up_DR) / 2)


def test_regmean_needs_activations() -> None:
    with pytest.raises(UsageError, match="regmean' needs the moments of activations"):
        combine([_adapter(0)], _all(1), [1.0], Recipe(combine="regmean"))


# -- masks -------------------------------------------------------------------------------------------------------


def _masked(seed: int) -> Bottleneck:
    g = torch.Generator().manual_seed(seed)
    return replace(
        _adapter(seed),
        down_mask_RD=torch.rand(SIZE, WIDTH, generator=g) < 0.4,
        up_mask_DR=torch.rand(WIDTH, SIZE, generator=g) < 0.4,
    )


def test_the_union_of_masks() -> None:
    pair = [_masked(0), _masked(1)]
    got = prune(_adapter(2), pair, None)
    assert got.down_mask_RD is not None and got.up_mask_DR is not None
    for name in ("down_mask_RD", "up_mask_DR"):
        assert torch.equal(getattr(got, name), getattr(pair[0], name) | getattr(pair[1], name))
    assert torch.equal(got.up_DR, _adapter(2).up_DR * got.up_mask_DR)


def test_a_budget_keeps_the_largest_entries_of_the_union() -> None:
    pair = [_masked(0), _masked(1)]
    union = prune(_adapter(2), pair, None)
    got = prune(_adapter(2), pair, 15)
    entries = torch.cat([union.down_RD.flatten(), union.up_DR.flatten()]).abs()
    kept = torch.cat([got.down_RD.flatten(), got.up_DR.flatten()]).abs()
    assert got.kept == 15 and torch.equal(kept.sort().values[-15:], entries.sort().values[-15:])
    assert prune(_adapter(2), pair, 999).kept == union.kept


def test_an_entry_that_happens_to_be_zero_comes_before_one_that_the_union_removes() -> None:
    pair = [_masked(0), _masked(1)]
    cancelled = replace(_adapter(2), down_RD=torch.zeros(SIZE, WIDTH, dtype=torch.float64))
    union = prune(cancelled, pair, None)
    got = prune(cancelled, pair, union.kept - 1)
    assert got.down_mask_RD is not None and union.down_mask_RD is not None
    assert not (got.down_mask_RD & ~union.down_mask_RD).any()


def test_dense_adapters_get_masks_from_a_budget_only() -> None:
    dense = [_adapter(0), _adapter(1)]
    assert prune(_adapter(2), dense, None).down_mask_RD is None
    assert prune(_adapter(2), dense, 20).kept == 20
    with pytest.raises(UsageError, match=r"merge\.budget = 1: leaves a matrix of the merged adapter without entries"):
        prune(_adapter(2), dense, 1)
    assert prune(_adapter(2), [_masked(0), _adapter(1)], None).down_mask_RD is None
