"""Updates are merged, never their factors; what a cut loses is told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.lowrank import LowRank, concatenate, merge_updates, truncate
from tests.reference.merging import dense_update, loop_ties

IN, OUT = 9, 7


def _update(seed: int, rank: int = 2, scaling: float = 1.0, dtype: torch.dtype = torch.float64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=g, dtype=dtype) for shape in ((rank, IN), (OUT, rank)))
    return LowRank(a, b, scaling)


UPDATES = [_update(0), _update(1, 3, 0.5), _update(2, 1, 4.0)]


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 0.01), min_size=4, max_size=4),
    scaling=st.floats(0.1, 8),
)
def test_concatenation_is_the_weighted_sum_of_updates(ranks: list[int], weights: list[float], scaling: float) -> None:
    updates = [_update(i, rank, scaling + i) for i, rank in enumerate(ranks)]
    merged, lost = merge_updates(updates, "cat", weights=weights[: len(ranks)], scale="sum")
    assert (merged.rank, merged.scaling, lost) == (sum(ranks), 1.0, 0.0)
    assert_close(merged.dense(), dense_update(updates, weights[: len(ranks)]))


@pytest.mark.parametrize(("scale", "factors"), [("mean", [0.25, 0.75]), ("sum", [1, 3]), (2.0, [0.5, 1.5])])
def test_the_scale(scale: str | float, factors: list[float]) -> None:
    merged, _ = merge_updates(UPDATES[:2], "cat", weights=[1, 3], scale=scale)
    assert_close(merged.dense(), dense_update(UPDATES[:2], factors))


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_copies_and_a_single_update(method: str) -> None:
    assert_close(merge_updates([UPDATES[1]] * 3, method)[0].dense(), UPDATES[1].dense())
    assert_close(merge_updates([UPDATES[1]], method, weights=[1.0], scale="sum")[0].dense(), UPDATES[1].dense())


@pytest.mark.parametrize("rank", [1, 2, 4, 6, 50])
def test_the_cut_in_factor_space_is_that_of_the_whole_matrix(rank: int) -> None:
    merged, lost = merge_updates(UPDATES, "svd", rank=rank, scale="sum")
    whole = dense_update(UPDATES, [1, 1, 1])
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    assert_close(merged.dense(), u[:, :rank] * s[:rank] @ v[:rank])
    assert lost == pytest.approx(float((merged.dense() - whole).norm() / whole.norm()), abs=1e-9)
    assert merged.rank == min(rank, 6)
    assert_close(merged.a_RD.norm(dim=1), merged.b_OR.norm(dim=0))


def test_a_cut_counts_the_scaling() -> None:
    cut, lost = truncate(UPDATES[1], 3)
    assert_close(cut.dense(), UPDATES[1].dense())
    assert cut.scaling == 1 and lost == 0


def test_ranks_wider_than_the_map() -> None:
    wide = [_update(0, 6), _update(1, 8)]
    merged, lost = merge_updates(wide, "svd", rank=7, scale="sum")
    assert_close(merged.dense(), dense_update(wide, [1, 1]))
    assert lost == pytest.approx(0, abs=1e-12) and merged.rank == 7


def test_an_update_of_zero_loses_nothing() -> None:
    merged, lost = truncate(LowRank(torch.randn(2, IN), torch.zeros(OUT, 2)), 1)
    assert lost == 0 and not merged.dense().any()


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, -0.5, 1.0]])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_is_that_of_the_whole_updates(density: float, weights: list[float]) -> None:
    merged, lost = merge_updates(UPDATES, "ties", weights=weights, density=density, rank=7)
    assert_close(merged.dense(), loop_ties([update.dense() for update in UPDATES], weights, density))
    assert lost == 0
    total, _ = merge_updates(UPDATES, "ties", weights=weights, density=density, rank=7, scale="sum")
    assert_close(total.dense(), merged.dense() * sum(map(abs, weights)))
    _, some = merge_updates(UPDATES, "ties", weights=weights, density=density)
    assert 0 < some < 1


def test_dare_keeps_a_share_and_makes_it_larger() -> None:
    values = UPDATES[1].dense()
    merged, _ = merge_updates([UPDATES[1]], "dare", density=0.4, rank=7)
    kept = merged.dense().abs() > 1e-9
    assert 0.2 < float(kept.double().mean()) < 0.6
    assert_close(merged.dense()[kept], values[kept] / 0.4)


def test_dare_is_right_on_average_repeatable_and_whole_at_density_1() -> None:
    wanted = dense_update(UPDATES, [0.5, -1, 2])
    draws = [
        merge_updates(UPDATES, "dare", weights=[0.5, -1, 2], scale="sum", density=0.5, rank=7, seed=seed)[0].dense()
        for seed in range(400)
    ]
    assert_close(torch.stack(draws).mean(0), wanted, atol=0.15 * float(wanted.abs().max()), rtol=0)
    again, _ = merge_updates(UPDATES, "dare", weights=[0.5, -1, 2], scale="sum", density=0.5, rank=7, seed=3)
    assert_close(again.dense(), draws[3])
    assert not torch.equal(draws[3], draws[4])
    whole, _ = merge_updates(UPDATES, "dare", weights=[0.5, -1, 2], scale="sum", density=1.0, rank=7)
    assert_close(whole.dense(), wanted)


def test_zeros_of_masks_stay_zeros() -> None:
    mask = torch.rand(2, IN, generator=torch.Generator().manual_seed(0)) < 0.5
    sparse = LowRank(UPDATES[0].a_RD * mask, UPDATES[0].b_OR)
    merged = concatenate([sparse, UPDATES[1]], [0.3, 0.7])
    assert torch.equal(merged.a_RD[:2] != 0, mask)


def test_half_precision_is_computed_in_fp32() -> None:
    half = [_update(i, dtype=torch.bfloat16) for i in range(2)]
    for method in ("cat", "svd", "ties", "dare"):
        assert merge_updates(half, method)[0].a_RD.dtype == torch.float32


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "dare"])
def test_updates_of_different_maps(method: str) -> None:
    other = LowRank(torch.zeros(2, IN), torch.zeros(OUT + 1, 2))
    with pytest.raises(UsageError, match=r"updates of shapes \[\(7, 9\), \(8, 9\)\] .*must be of one linear map"):
        merge_updates([UPDATES[0], other], method)


def test_wrong_settings() -> None:
    with pytest.raises(UsageError, match=r"merge\.method = 'linear': must be one of cat, svd, ties, dare"):
        merge_updates(UPDATES, "linear")
    with pytest.raises(UsageError, match=r"merge\.rank = 4: must be at least 1, and cat takes none"):
        merge_updates(UPDATES, "cat", rank=4)
    with pytest.raises(UsageError, match=r"merge\.rank = 0"):
        merge_updates(UPDATES, "svd", rank=0)
    with pytest.raises(UsageError, match=r"merge\.density = 0: must be above 0 and at most 1"):
        merge_updates(UPDATES, "dare", density=0)
    with pytest.raises(UsageError, match="have no rank"):
        LowRank(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(UsageError, match=r"with 1 weights: must be of one linear map"):
        merge_updates(UPDATES, weights=[1.0])
