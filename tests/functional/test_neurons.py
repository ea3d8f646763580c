"""Canonical forms compute the same; neurons move without a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.neurons import Bottleneck, canonicalise, carry
from peft_lightning.functional.transport import Plan
from tests.reference.merging import inner, output


def _adapter(size: int = 4, width: int = 6, seed: int = 0, masked: bool = False) -> Bottleneck:
    g = torch.Generator().manual_seed(seed)
    shapes = ((size, width), (size,), (width, size), (width,))
    down, bias, up, up_bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    masks = (
        [torch.rand(shape, generator=g) < 0.5 for shape in ((size, width), (width, size))] if masked else [None, None]
    )
    return Bottleneck(down, bias, up, up_bias, 2.5, *masks)


INPUTS = torch.randn(30, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_canonical_form_computes_the_same(masked: bool, balance: bool) -> None:
    source = _adapter(masked=masked)
    plain, factor_R = canonicalise(source, balance=balance)
    assert plain.scaling == 1
    assert_close(output(plain, INPUTS), output(source, INPUTS))
    assert_close(inner(plain, INPUTS), inner(source, INPUTS) * factor_R)


def test_balanced_neurons_have_equal_norms_on_both_sides() -> None:
    plain, _ = canonicalise(_adapter(), balance=True)
    assert plain.down_bias_R is not None
    incoming = (plain.down_RD.square().sum(1) + plain.down_bias_R.square()).sqrt()
    assert_close(incoming, plain.up_DR.norm(dim=0))


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_dead_neuron_stays_as_it_is(side: str) -> None:
    source = _adapter()
    down, bias, up = source.down_RD.clone(), source.down_bias_R, source.up_DR.clone()
    assert bias is not None
    (down if side == "in" else up.t())[1] = 0
    source = replace(source, down_RD=down, down_bias_R=bias * torch.tensor([1, 0, 1, 1]), up_DR=up)
    plain, factor_R = canonicalise(source, balance=True)
    assert factor_R[1] == 1 and factor_R[0] != 1
    assert_close(output(plain, INPUTS), output(source, INPUTS))


def test_half_precision_is_computed_in_fp32() -> None:
    half = Bottleneck(torch.ones(2, 3).bfloat16(), None, torch.ones(3, 2).bfloat16(), None)
    assert canonicalise(half)[0].down_RD.dtype == torch.float32


@given(size=st.integers(1, 6), more=st.integers(0, 4), seed=st.integers(0, 99), masked=st.booleans())
def test_neurons_move_without_a_trace(size: int, more: int, seed: int, masked: bool) -> None:
    source, _ = canonicalise(_adapter(size, seed=seed, masked=masked))
    slots = torch.randperm(size + more, generator=torch.Generator().manual_seed(seed))[:size]
    moved, owned = carry(source, Plan(slots_S=slots), size + more)
    assert owned.nonzero().flatten().tolist() == sorted(slots.tolist())
    assert_close(output(moved, INPUTS), output(source, INPUTS))
    assert_close(moved.down_RD[slots], source.down_RD)
    assert moved.kept == (source.kept if masked else 2 * 6 * (size + more))


def test_mixed_neurons_take_the_masks_of_all_that_they_are_made_of() -> None:
    source, _ = canonicalise(_adapter(3, masked=True))
    assert source.down_mask_RD is not None and source.up_mask_DR is not None
    plan = Plan(mass_ST=torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64) / 3)
    moved, owned = carry(source, plan, 2)
    assert owned.all() and moved.down_mask_RD is not None and moved.up_mask_DR is not None
    assert torch.equal(moved.down_mask_RD[0], source.down_mask_RD[0] | source.down_mask_RD[1])
    assert torch.equal(moved.up_mask_DR[:, 1], source.up_mask_DR[:, 1] | source.up_mask_DR[:, 2])
    assert_close(moved.down_RD[0], (2 * source.down_RD[0] + source.down_RD[1]) / 3)
    assert_close(moved.up_DR[:, 0], source.up_DR[:, 0] + source.up_DR[:, 1] / 2)


def test_shapes_that_do_not_fit() -> None:
    down, up = torch.zeros(2, 3), torch.zeros(3, 2)
    right = Bottleneck(down, None, up, None)
    for name, wrong in {"up_DR": down, "down_bias_R": torch.zeros(3), "up_bias_D": torch.zeros(2)}.items():
        with pytest.raises(UsageError, match=rf"{name} has shape .*must be"):
            replace(right, **{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="masks of both matrices"):
        Bottleneck(down, None, up, None, down_mask_RD=down > 0)
