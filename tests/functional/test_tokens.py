"""Which tokens stay: counts are exact, importance comes before noise, and sums are what a loop gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.tokens import gather_tokens, kept_length, loss_sums, scatter_tokens, select_tokens


@given(length=st.integers(8, 600), ratio=st.floats(0.01, 1.0))
def test_kept_length(length: int, ratio: float) -> None:
    kept = kept_length(length, ratio)
    assert kept == length if ratio == 1.0 else kept % 8 == 0 or kept == length
    assert 8 <= kept <= length
    assert abs(kept - ratio * length) <= 4 or kept in (8, length)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_a_ratio_outside_its_range(ratio: float) -> None:
    with pytest.raises(UsageError, match=r"drop\.keep = .*above 0 and at most 1"):
        kept_length(128, ratio)


@given(seed=st.integers(0, 1000), length=st.integers(2, 40))
def test_selection_against_sorting_pairs(seed: int, length: int) -> None:
    """The oracle sorts (importance, noise) pairs; importances repeat, and some are infinite."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, 4, (3, length), generator=generator).float()
    importance[:, ::5] = torch.inf
    importance[:, 3::7] = -torch.inf
    noise = torch.rand(3, length, generator=generator)
    kept = int(torch.randint(1, length + 1, (), generator=generator))
    found = select_tokens(importance, kept, noise)
    for row in range(3):
        order = sorted(range(length), key=lambda i: (-float(importance[row, i]), float(noise[row, i])))
        assert found[row].tolist() == sorted(order[:kept])


def test_ties_are_broken_evenly() -> None:
    """1,000 blocks of equal tokens, half of them kept: each position stays in about half of the blocks."""
    noise = torch.rand(1000, 16, generator=torch.Generator().manual_seed(0))
    found = select_tokens(torch.zeros(1000, 16), 8, noise)
    shares = torch.bincount(found.flatten(), minlength=16) / 1000
    assert ((shares - 0.5).abs() < 0.07).all()


def test_gather_and_scatter_are_each_others_inverse() -> None:
    x, y = torch.randn(2, 7, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    positions = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5]])
    merged = scatter_tokens(x, positions, y)
    assert_close(gather_tokens(merged, positions), y)
    expected = x.detach().clone()
    for b in range(2):
        for k in range(4):
            expected[b, positions[b, k]] = y[b, k]
    assert_close(merged, expected)
    merged.sum().backward()
    assert y.grad is not None and (y.grad == 1).all()
    assert x.grad is not None and x.grad.sum() == 3 * 3 * 2  # the three that were not replaced, in two blocks


def test_loss_sums() -> None:
    ids, losses = torch.tensor([3, 1, 3, 3]), torch.tensor([1.0, 2.0, 0.5, 0.25], dtype=torch.bfloat16)
    sums = loss_sums(ids, losses, 5)
    assert_close(sums, torch.tensor([[0, 2.0, 0, 1.75, 0], [0, 1.0, 0, 3.0, 0]]))
