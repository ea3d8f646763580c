"""Masks: exact counts whatever the scores, the right entries, and loud degenerate cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lightning.errors import UsageError
from peft_lightning.functional.sparsify import DegenerateScoreError, kept_count, top_masks
from tests.reference.masks import loop_top_masks


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    sparsity=st.floats(0.01, 0.99),
    levels=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_counts_are_exact_with_many_ties(
    shapes: list[tuple[int, int]], sparsity: float, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(levels, shape, generator=generator).float() for i, shape in enumerate(shapes)}
    total = sum(z.numel() for z in scores.values())
    try:
        masks = top_masks(scores, sparsity, seed=seed)
    except DegenerateScoreError:
        flat = torch.cat([z.flatten() for z in scores.values()])
        kept = kept_count(total, sparsity)
        # allowed only if all scores tie, or if some tensor could really end up with nothing
        assert flat.unique().numel() == 1 or kept < total - min(z.numel() for z in scores.values()) + 1
        return
    assert sum(int(m.sum()) for m in masks.values()) == kept_count(total, sparsity)
    lowest_kept = min(float(z[masks[n]].min()) for n, z in scores.items())
    removed = [float(z[~masks[n]].max()) for n, z in scores.items() if not masks[n].all()]
    assert all(z <= lowest_kept for z in removed)


def test_global_masks_equal_a_plain_sort() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.randn(7, 5), "b": torch.randn(4, 6) * 3}
    masks = top_masks(scores, 0.4)
    kept = {(n, i) for n, m in masks.items() for i in m.flatten().nonzero().flatten().tolist()}
    assert kept == loop_top_masks(scores, kept_count(35 + 24, 0.4))


def test_scope_tensor_keeps_the_share_in_each() -> None:
    torch.manual_seed(0)
    masks = top_masks({"a": torch.randn(10, 10), "b": torch.randn(10, 10) * 1e-6}, 0.4, scope="tensor")
    assert [int(m.sum()) for m in masks.values()] == [60, 60]


def test_ties_depend_on_the_seed_only() -> None:
    scores = {"a": torch.cat([torch.zeros(50), torch.ones(50)]).view(10, 10)}
    one, again, other = (top_masks(scores, 0.25, seed=s)["a"] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_zero_sparsity_keeps_all_without_looking_at_scores() -> None:
    assert top_masks({"a": torch.full((2, 2), float("nan"))}, 0.0)["a"].all()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    with pytest.raises(UsageError, match=r"sparsity = .*at least 0 and below 1"):
        top_masks({"a": torch.randn(3, 3)}, sparsity)


def test_unknown_scope() -> None:
    with pytest.raises(UsageError, match="scope = 'layer'.*'global' or 'tensor'"):
        top_masks({"a": torch.randn(3, 3)}, 0.5, scope="layer")


def test_nothing_to_prune() -> None:
    with pytest.raises(UsageError, match="no tensor to prune"):
        top_masks({}, 0.5)


def test_degenerate_scores_name_the_tensor() -> None:
    with pytest.raises(DegenerateScoreError, match=r"up: 1 of 4 scores are not finite"):
        top_masks({"down": torch.ones(4), "up": torch.tensor([1.0, 2.0, float("nan"), 3.0])}, 0.5)
    with pytest.raises(DegenerateScoreError, match=r"down, up: all 8 scores equal 0"):
        top_masks({"down": torch.zeros(4), "up": torch.zeros(4)}, 0.5)
    with pytest.raises(DegenerateScoreError, match=r"up: no weight of it would stay.*scope = tensor"):
        top_masks({"down": torch.arange(1.0, 9.0), "up": torch.zeros(4)}, 0.5)
