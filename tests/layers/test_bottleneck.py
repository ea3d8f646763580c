"""The adapter equals a hand-written computation; its places are checked in test_adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from peft_lightning.layers.bottleneck import NONLINEARITIES, Bottleneck
from peft_lightning.layers.masked import MaskedLinear, prunable


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_equals_the_formula(nonlinearity: str, masked: bool) -> None:
    torch.manual_seed(0)
    adapter = Bottleneck(8, 4, nonlinearity=nonlinearity, scaling=0.5, init_std=0.5, masked=masked)
    torch.nn.init.normal_(adapter.adapter_up.bias)
    down = adapter.adapter_down[0]
    assert isinstance(down, MaskedLinear)
    if masked:
        for parameter in prunable(adapter).values():
            parameter.set_mask(torch.rand(parameter.weight.shape) < 0.5)
    h = torch.randn(2, 3, 8)
    act = NONLINEARITIES[nonlinearity]()
    expected = torch.empty_like(h)
    for b in range(2):
        for t in range(3):
            inner = act(down.weight @ h[b, t] + down.bias)
            expected[b, t] = h[b, t] + 0.5 * (adapter.adapter_up.weight @ inner + adapter.adapter_up.bias)
    assert_close(adapter(h), expected)


def test_computes_in_the_inputs_dtype_with_fp32_parameters() -> None:
    adapter = Bottleneck(8, 4, masked=True)
    h = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    out = adapter(h)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert adapter.adapter_up.weight.grad is not None


def test_a_hook_follows_a_deep_copy() -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Identity()
            self.adapter = Bottleneck(8, 4)
            self.inner.register_forward_hook(self.adapter.after)

    holder = Holder()
    twin = copy.deepcopy(holder)
    torch.nn.init.zeros_(twin.adapter.adapter_up.weight)
    h = torch.randn(1, 2, 8)
    assert_close(twin.inner(h), h)
    assert not torch.equal(holder.inner(h), h)
