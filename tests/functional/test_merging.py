"""What a merge must leave as it is, whatever the preset; the paper's presets; alignment of unequal sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.merging import Merge, merge
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck, canonicalise, carry
from peft_lightning.functional.recipes import PRESETS, Recipe
from peft_lightning.functional.repairing import refit
from tests.reference.merging import NONLINEARITIES, inner, output, paper_average, permuted, regression_mean
from tests.reference.transport import broadcast_cost

WIDTH, SIZE = 20, 8
RECIPES = {**PRESETS, "gain": replace(PRESETS["select"], choice="gain")}
ALIGNED = ["wts", "acts", "acts+", "select", "gain"]


def _adapter(seed: int, size: int = SIZE, dtype: torch.dtype = torch.float64, scaling: float = 1.0) -> Bottleneck:
    g = torch.Generator().manual_seed(seed)
    shapes = ((size, WIDTH), (size,), (WIDTH, size), (WIDTH,))
    down, bias, up, up_bias = (torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)
    return Bottleneck(down, bias * 0.3, up, up_bias * 0.3, scaling)


def _inputs(tokens: int = 400, seed: int = 99, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, WIDTH, generator=g, dtype=torch.float64).to(dtype)


def _order(seed: int, size: int = SIZE) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _whole(
    sources: Sequence[Bottleneck],
    recipe: Recipe,
    weights: Sequence[float] | None = None,
    nonlinearity: str = "relu",
    fp32: bool = False,
) -> Merge:
    """Everything that a recipe asks for, over the same inputs for all adapters."""
    inputs_ND = _inputs(dtype=sources[0].down_RD.dtype)
    act = NONLINEARITIES[nonlinearity]
    sizes = [source.size for source in sources]
    pre, post = Moments(sizes, torch.float32 if fp32 else torch.float64), Moments(sizes)
    z = [inner(source, inputs_ND) for source in sources]
    pre.add(z)
    post.add([act(part) for part in z])
    needs = recipe.needs
    result = merge(
        sources,
        recipe,
        weights=weights,
        nonlinearity=nonlinearity,
        pre=pre if "pre" in needs else None,
        post=post if "post" in needs else None,
    )
    if "refit" in needs:
        moments = Moments([result.bottleneck.size, *sizes])
        moments.add([act(inner(adapter, inputs_ND)) for adapter in (result.bottleneck, *sources)])
        repaired = refit(result.bottleneck, sources, result.outputs, moments, recipe.ridge)
        result = replace(result, bottleneck=repaired)
    return result


def _same_function(
    got: Bottleneck, wanted: Bottleneck, factor: float = 1.0, atol: float = 1e-6, act: str = "relu"
) -> None:
    fresh = _inputs(50, seed=7, dtype=got.down_RD.dtype)
    assert_close(output(got, fresh, act), factor * output(wanted, fresh, act), atol=atol * factor, rtol=atol)


# -- invariants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("preset", ["avg", *ALIGNED])
def test_copies_merge_to_the_adapter(preset: str, scaling: float, copies: int) -> None:
    source = _adapter(0, scaling=scaling)
    result = _whole([source] * copies, replace(RECIPES[preset], scale="mean"))
    assert result.bottleneck.scaling == 1
    _same_function(result.bottleneck, source, atol=1e-9)
    result = _whole([source] * copies, replace(RECIPES[preset], scale="sum"))
    _same_function(result.bottleneck, source, copies, atol=1e-9)


def test_the_papers_sum_of_copies_grows_with_their_square() -> None:
    source = replace(_adapter(0), up_bias_D=None, down_bias_R=None)
    _same_function(_whole([source] * 3, PRESETS["sum"]).bottleneck, source, 9)


@pytest.mark.parametrize("preset", ALIGNED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_adapter_and_itself_with_its_neurons_in_another_order(preset: str, dtype: torch.dtype) -> None:
    source = _adapter(0, dtype=dtype)
    family = [source, permuted(source, _order(1)), permuted(source, _order(2))]
    recipe = replace(RECIPES[preset], scale="mean")
    result = _whole(family, recipe, fp32=dtype == torch.float32)
    _same_function(result.bottleneck, source, atol=1e-9 if dtype == torch.float64 else 2e-5)
    averaged = _whole(family, PRESETS["avg"]).bottleneck
    with pytest.raises(AssertionError, match="not close"):
        _same_function(averaged, source, atol=1e-2)


def test_small_weights_are_the_same_to_1e6_in_fp32() -> None:
    # as large as trained ones are; the notes ask for 1e-6
    big = _adapter(0, dtype=torch.float32)
    source = replace(big, down_RD=big.down_RD * 0.05, up_DR=big.up_DR * 0.05)
    for preset in ALIGNED:
        result = _whole([source, permuted(source, _order(1))], replace(RECIPES[preset], scale="mean"), fp32=True)
        _same_function(result.bottleneck, source, atol=1e-6)


@pytest.mark.parametrize("solver", ["emd", "assignment"])
@pytest.mark.parametrize("features", ["down", "all"])
@pytest.mark.parametrize("metric", ["euclidean", "squared", "inner"])
def test_permuted_neurons_are_found_by_every_cost(metric: str, features: str, solver: str) -> None:
    source = _adapter(0)
    recipe = Recipe(align="weights", metric=metric, features=features, solver=solver)
    _same_function(merge([source, permuted(source, _order(1))], recipe).bottleneck, source)


def test_neurons_that_were_rescaled_too_are_found_after_balancing() -> None:
    source, factor_R = _adapter(0), torch.linspace(0.1, 8, SIZE, dtype=torch.float64)[:, None]
    assert source.down_bias_R is not None
    rescaled = Bottleneck(
        source.down_RD * factor_R, source.down_bias_R * factor_R[:, 0], source.up_DR / factor_R[:, 0], source.up_bias_D
    )
    family = [source, permuted(rescaled, _order(3))]
    _same_function(_whole(family, replace(PRESETS["acts"], balance=True)).bottleneck, source, atol=1e-9)
    _same_function(_whole(family, PRESETS["acts+"]).bottleneck, source, atol=1e-9)
    _same_function(_whole(family, replace(PRESETS["select"], scale="mean")).bottleneck, source, atol=1e-9)


@pytest.mark.parametrize("preset", sorted(RECIPES))
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_one_adapter_of_weight_1_is_unchanged(preset: str, scale: str) -> None:
    source = _adapter(0, scaling=2.0)
    result = _whole([source], replace(RECIPES[preset], scale=scale), weights=[1.0])
    _same_function(result.bottleneck, source, atol=1e-9)
    if not RECIPES[preset].balance:
        assert torch.equal(result.bottleneck.down_RD, source.down_RD)
        assert torch.equal(result.bottleneck.up_DR, 2 * source.up_DR)


@pytest.mark.parametrize("preset", ["acts+", "select", "gain"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_order_of_the_adapters_does_not_matter(preset: str, count: int) -> None:
    sources, weights = [_adapter(seed) for seed in range(count)], [1.0, 0.5, 2.0, 1.0][:count]
    wanted = _whole(sources, RECIPES[preset], weights).bottleneck
    for order in list(permutations(range(count)))[1:8]:
        got = _whole([sources[i] for i in order], RECIPES[preset], [weights[i] for i in order]).bottleneck
        _same_function(got, wanted, atol=1e-9)


def test_with_the_first_as_reference_the_order_does_matter() -> None:
    sources = [_adapter(seed) for seed in range(3)]
    wanted = _whole(sources, PRESETS["acts"]).bottleneck
    with pytest.raises(AssertionError, match="not close"):
        _same_function(_whole(sources[::-1], PRESETS["acts"]).bottleneck, wanted, atol=1e-3)


def test_the_medoid_is_the_adapter_that_is_closest_to_the_others() -> None:
    center = _adapter(0)
    near = [replace(center, down_RD=center.down_RD + 0.1 * _adapter(seed).down_RD) for seed in (1, 2, 3)]
    recipe = Recipe(align="weights", reference="medoid")
    for place in range(4):
        sources = [*near[:place], center, *near[place:]]
        alignment = merge(sources, recipe).alignment
        assert alignment is not None and alignment.reference == place


# -- the paper's presets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["avg", "wts", "acts"])
def test_presets_are_equations_2_to_5(preset: str) -> None:
    sources, inputs_ND = [_adapter(seed) for seed in range(4)], _inputs()
    plans = []
    for source in sources:
        one, other = {
            "avg": (torch.eye(SIZE), torch.eye(SIZE)),
            "wts": (source.down_RD, sources[0].down_RD),
            "acts": (inner(source, inputs_ND).t(), inner(sources[0], inputs_ND).t()),
        }[preset]
        cost = broadcast_cost(one, other, "euclidean").numpy()
        uniform = torch.full((SIZE,), 1 / SIZE, dtype=torch.float64).numpy()
        import ot

        plans.append(torch.from_numpy(ot.emd(uniform, uniform, cost)))
    got, wanted = _whole(sources, PRESETS[preset]).bottleneck, paper_average(sources, plans)
    for name in ("down_RD", "down_bias_R", "up_DR", "up_bias_D"):
        assert_close(getattr(got, name), getattr(wanted, name), atol=1e-9, rtol=0)


def test_sum_is_equation_1() -> None:
    sources = [_adapter(seed, scaling=3.0) for seed in range(3)]
    got = merge(sources, PRESETS["sum"]).bottleneck
    assert_close(got.down_RD, sources[0].down_RD + sources[1].down_RD + sources[2].down_RD)
    assert_close(got.up_DR, 3 * (sources[0].up_DR + sources[1].up_DR + sources[2].up_DR))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_scale_is_a_factor_of_the_output(preset: str) -> None:
    sources = [_adapter(seed) for seed in range(4)]
    mean, total, third = (
        _whole(sources, replace(PRESETS[preset], scale=scale)).bottleneck for scale in ("mean", "sum", 1 / 3)
    )
    if preset != "sum":  # whose own scale is equation 1, in both matrices
        _same_function(total, mean, 4, atol=1e-9)
    _same_function(third, mean, 1 / 3, atol=1e-9)


def test_what_presets_need() -> None:
    needs = {name: recipe.needs for name, recipe in PRESETS.items()}
    assert needs == {
        "sum": (),
        "avg": (),
        "wts": (),
        "acts": ("pre",),
        "acts+": ("pre", "refit"),
        "select": ("post",),
    }


# -- unequal sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["wts", "acts", "acts+"])
@pytest.mark.parametrize("sizes", [(48, 64), (64, 48), (48, 64, 64, 10)])
def test_adapters_of_unequal_sizes_keep_their_functions(preset: str, sizes: tuple[int, ...]) -> None:
    sources = [_adapter(seed, size) for seed, size in enumerate(sizes)]
    result = _whole(sources, PRESETS[preset])
    assert result.alignment is not None
    assert result.bottleneck.size == result.alignment.slots == 64
    for source, plan in zip(sources, result.alignment.plans, strict=True):
        moved, owned_T = carry(source, plan, 64)
        _same_function(moved, source, atol=1e-9)
        assert int(owned_T.sum()) == source.size


def test_48_neurons_out_of_64_merge_with_all_of_them_exactly() -> None:
    large = _adapter(0, 64)
    small = permuted(large, _order(5, 64)[:48])
    wanted = 0.5 * (output(large, _inputs()) + output(small, _inputs()))
    for sources in ([large, small], [small, large]):
        for preset in ("wts", "acts", "acts+"):
            assert_close(output(_whole(sources, PRESETS[preset]).bottleneck, _inputs()), wanted)


def test_optimal_transport_shrinks_to_the_reference() -> None:
    sources = [_adapter(0, 5), _adapter(1, 9)]
    result = merge(sources, Recipe(align="weights", solver="emd"))
    assert result.alignment is not None and result.bottleneck.size == result.alignment.slots == 5
    # what flows out of nine neurons flows out of five
    moved, _ = carry(sources[1], result.alignment.plans[1], 5)
    assert_close(moved.up_DR.sum(1), sources[1].up_DR.sum(1))


@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
def test_importance_gives_strong_neurons_more_mass(solver: str) -> None:
    sources = [_adapter(0), _adapter(1)]
    recipe = Recipe(align="weights", solver=solver, marginals="importance", regularisation=0.05)
    alignment = merge(sources, recipe).alignment
    assert alignment is not None
    norm_R = sources[1].down_RD.norm(dim=1)
    assert_close(alignment.plans[1].mass(SIZE).sum(1), norm_R / norm_R.sum(), atol=1e-4, rtol=0)


def test_a_sinkhorn_merge_tends_to_the_assigned_one() -> None:
    sources = [_adapter(0), _adapter(1)]
    wanted = merge(sources, PRESETS["wts"]).bottleneck
    gaps = []
    for regularisation in (0.3, 0.01, 0.0003):
        recipe = Recipe(align="weights", solver="sinkhorn", regularisation=regularisation)
        gaps.append(float((merge(sources, recipe).bottleneck.down_RD - wanted.down_RD).norm()))
    assert gaps[0] > gaps[1] > 20 * gaps[2]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (5, 8)])
def test_regmean_after_the_alignment_is_that_of_the_moved_activations(sizes: tuple[int, ...], balance: bool) -> None:
    sources = [_adapter(seed, size) for seed, size in enumerate(sizes)]
    weights = [1.0, 0.5, 2.0][: len(sizes)]
    recipe = Recipe(align="activations", combine="regmean", ridge=1e-12, balance=balance)
    result = _whole(sources, recipe, weights)
    assert result.alignment is not None
    ups, activations = [], []
    for source, plan in zip(sources, result.alignment.plans, strict=True):
        assert plan.slots_S is not None
        plain = canonicalise(source, balance=balance)[0]
        ups.append(torch.zeros(WIDTH, max(sizes), dtype=torch.float64))
        activations.append(torch.zeros(400, max(sizes), dtype=torch.float64))
        for neuron, slot in enumerate(plan.slots_S.tolist()):
            ups[-1][:, slot] = plain.up_DR[:, neuron]
            activations[-1][:, slot] = inner(plain, _inputs()).relu()[:, neuron]
    wanted = regression_mean(ups, activations, weights, recipe.shrink)
    assert_close(result.bottleneck.up_DR, wanted, atol=1e-6, rtol=1e-6)


def test_with_a_narrow_reference_the_order_of_the_others_does_not_matter() -> None:
    sources = [_adapter(0, 5), _adapter(1, 6), _adapter(2, 8)]
    wanted = merge(sources, PRESETS["wts"]).bottleneck
    _same_function(merge([sources[0], sources[2], sources[1]], PRESETS["wts"]).bottleneck, wanted, atol=1e-9)


def test_the_medoid_is_one_of_the_widest() -> None:
    large = [_adapter(0, 9), _adapter(1, 9)]
    central = replace(_adapter(2, 6), down_RD=0.3 * _adapter(2, 6).down_RD)
    alignment = merge([central, *large], Recipe(align="weights", reference="medoid")).alignment
    assert alignment is not None and alignment.reference in (1, 2)
    alignment = merge([central, *large], Recipe(align="weights", reference="medoid", solver="emd")).alignment
    assert alignment is not None and alignment.reference == 0  # mixing can shrink to it


# -- other nonlinearities, missing biases, masks, reports ----------------------------------------------------------


@pytest.mark.parametrize("preset", ["acts+", "select"])
def test_scales_stay_where_the_nonlinearity_does_not_let_them_pass(preset: str) -> None:
    source = _adapter(0)
    family = [source, permuted(source, _order(1))]
    result = _whole(family, replace(RECIPES[preset], scale="mean"), nonlinearity="gelu")
    _same_function(result.bottleneck, source, atol=1e-9, act="gelu")


@pytest.mark.parametrize(
    "recipe", [Recipe(align="activations"), Recipe(combine="regmean"), Recipe(combine="select", repair="refit")]
)
def test_moments_of_adapters_as_they_are_stand_for_those_of_balanced_ones(recipe: Recipe) -> None:
    sources = [_adapter(seed) for seed in range(3)]
    balanced = [canonicalise(source, balance=True)[0] for source in sources]
    got, wanted = _whole(sources, replace(recipe, balance=True)), _whole(balanced, recipe)
    assert_close(got.bottleneck.up_DR, wanted.bottleneck.up_DR)
    if recipe.align == "activations":
        assert got.alignment is not None and wanted.alignment is not None
        assert got.alignment.costs == pytest.approx(wanted.alignment.costs)


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_biases_may_be_missing(preset: str) -> None:
    bare = replace(_adapter(0), down_bias_R=None, up_bias_D=None)
    result = _whole([bare, bare], RECIPES[preset]).bottleneck
    assert result.down_bias_R is None and result.up_bias_D is None
    mixed = _whole([bare, _adapter(1)], RECIPES[preset]).bottleneck
    assert mixed.down_bias_R is not None and mixed.up_bias_D is not None


def _sparse(seed: int) -> Bottleneck:
    dense, g = _adapter(seed), torch.Generator().manual_seed(seed)
    down_mask = torch.rand(SIZE, WIDTH, generator=g) < 0.4
    up_mask = torch.rand(WIDTH, SIZE, generator=g) < 0.4
    return replace(
        dense,
        down_RD=dense.down_RD * down_mask,
        up_DR=dense.up_DR * up_mask,
        down_mask_RD=down_mask,
        up_mask_DR=up_mask,
    )


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_sparse_adapters_merge_to_the_union_of_their_masks(preset: str) -> None:
    source = _sparse(0)
    family = [source, permuted(source, _order(1))]
    result = _whole(family, replace(RECIPES[preset], scale="mean")).bottleneck
    assert result.down_mask_RD is not None and result.up_mask_DR is not None
    assert not result.down_RD[~result.down_mask_RD].any() and not result.up_DR[~result.up_mask_DR].any()
    if preset in ALIGNED:
        assert result.kept == source.kept
        _same_function(result, source, atol=1e-9)
    other = _whole([source, _sparse(1)], RECIPES[preset]).bottleneck
    assert source.kept < other.kept < other.down_RD.numel() * 2 or preset in ("select", "gain")


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_sparse_adapters_merge_to_a_budget(preset: str) -> None:
    sources = [_sparse(0), _sparse(1), _sparse(2)]
    average = _whole(sources, replace(RECIPES[preset], masks="budget")).bottleneck
    given = _whole(sources, replace(RECIPES[preset], masks="budget", budget=41)).bottleneck
    assert average.kept == round(sum(source.kept for source in sources) / 3) or preset in ("select", "gain")
    assert given.kept == 41
    assert int((given.down_RD != 0).sum() + (given.up_DR != 0).sum()) <= 41


def test_one_dense_adapter_makes_the_union_dense() -> None:
    assert merge([_sparse(0), _adapter(1)], PRESETS["avg"]).bottleneck.down_mask_RD is None


def test_the_report_tells_matched_from_unmatched() -> None:
    source = _adapter(0)
    alignment = merge([source, permuted(source, _order(1)), _adapter(2)], PRESETS["wts"]).alignment
    assert alignment is not None
    assert alignment.costs[0] == 0 and alignment.costs[1] == pytest.approx(0, abs=1e-6) and alignment.costs[2] > 1
    assert alignment.cosines[1] == pytest.approx(1) and alignment.cosines[2] < 0.8


def test_the_norm_ratio() -> None:
    source = _adapter(0)
    assert merge([source, source], PRESETS["avg"]).norm_ratio == pytest.approx(1)
    assert merge([source, source], PRESETS["sum"]).norm_ratio == pytest.approx(2)
    assert merge([source, _adapter(1)], PRESETS["avg"]).norm_ratio < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "recipe",
    [*PRESETS.values(), Recipe(combine="ties"), Recipe(combine="regmean"), Recipe(align="weights", solver="emd")],
)
def test_the_result_is_in_fp32_or_in_the_dtype_of_the_adapters(recipe: Recipe, dtype: torch.dtype) -> None:
    wanted = _whole([_adapter(0), _adapter(1)], recipe).bottleneck
    got = _whole([_cast(_adapter(seed), dtype) for seed in (0, 1)], recipe).bottleneck
    for tensor in (got.down_RD, got.down_bias_R, got.up_DR, got.up_bias_D):
        assert tensor is not None and tensor.dtype == torch.promote_types(dtype, torch.float32)
    if dtype != torch.bfloat16:
        _same_function(_cast(got, torch.float64), wanted, atol=1e-9 if dtype == torch.float64 else 1e-4)


def _cast(adapter: Bottleneck, dtype: torch.dtype) -> Bottleneck:
    assert adapter.down_bias_R is not None and adapter.up_bias_D is not None
    return Bottleneck(
        adapter.down_RD.to(dtype), adapter.down_bias_R.to(dtype), adapter.up_DR.to(dtype), adapter.up_bias_D.to(dtype)
    )


# -- half shared adapters: ours are better than the paper's ------------------------------------------------------


def test_balancing_and_refitting_pay_where_neurons_were_rescaled() -> None:
    base, sources = _adapter(0, 16), []
    for seed in range(1, 5):
        g, noise = torch.Generator().manual_seed(seed), _adapter(seed, 16)
        factor_R = torch.rand(16, generator=g, dtype=torch.float64) * 3 + 0.2
        assert base.down_bias_R is not None
        down, up = (base.down_RD + 0.2 * noise.down_RD) * factor_R[:, None], (base.up_DR + 0.2 * noise.up_DR) / factor_R
        sources.append(permuted(Bottleneck(down, base.down_bias_R * factor_R, up, noise.up_bias_D), _order(seed, 16)))
    fresh = _inputs(500, seed=3)
    wanted = sum((output(source, fresh) for source in sources), torch.zeros(500, WIDTH)) / 4
    error = {
        preset: float((output(_whole(sources, PRESETS[preset]).bottleneck, fresh) - wanted).norm() / wanted.norm())
        for preset in ("avg", "acts", "acts+")
    }
    assert error["acts+"] < 0.7 * error["acts"] < 0.7 * error["avg"]


# -- wrong input -------------------------------------------------------------------------------------------------


def test_wrong_sources() -> None:
    with pytest.raises(UsageError, match=r"model widths \[\]: there must be at least one"):
        merge([], PRESETS["avg"])
    other = Bottleneck(torch.zeros(2, 3), None, torch.zeros(3, 2), None)
    with pytest.raises(UsageError, match=r"model widths \[20, 3\]: .*all for the same"):
        merge([_adapter(0), other], PRESETS["avg"])
    with pytest.raises(UsageError, match=r"weights = \[1\.0\]: must be 2"):
        merge([_adapter(0)] * 2, PRESETS["avg"], weights=[1.0])
    with pytest.raises(UsageError, match=r"merge\.reference = 2: must be from 0 to 1"):
        merge([_adapter(0)] * 2, Recipe(align="weights", reference=2))
    spoilt = replace(_adapter(0), down_RD=torch.full((SIZE, WIDTH), float("nan"), dtype=torch.float64))
    with pytest.raises(UsageError, match="cost is not finite"):
        merge([_adapter(0), spoilt], PRESETS["wts"])


@pytest.mark.parametrize("preset", ["acts", "acts+", "select"])
def test_missing_moments(preset: str) -> None:
    with pytest.raises(UsageError, match=r"merge\..* needs (the )?moments"):
        merge([_adapter(0)] * 2, PRESETS[preset])
    foreign = Moments([3, 3])
    foreign.add([F.relu(torch.randn(5, 3))] * 2)
    with pytest.raises(UsageError, match=r"moments .*of .*\(3, 3\)"):
        merge([_adapter(0)] * 2, PRESETS[preset], pre=foreign, post=foreign)
