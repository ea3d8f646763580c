"""The low-rank update is the formula, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.masked import prunable


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8)], ids=str)
def test_output_and_gradients_are_the_formulas(masked: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, layer = nn.Linear(8, 6).double(), LoRA(8, 6, 3, scaling=0.7, masked=masked).double()
    nn.init.normal_(layer.lora_B)
    for parameter in prunable(layer).values() if masked else ():
        parameter.set_mask(torch.rand(parameter.weight.shape) < 0.6)
    linear.register_forward_hook(layer.after)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(*shape[:-1], 6, dtype=torch.float64)
    a, b = layer.effective("lora_A"), layer.effective("lora_B")
    expected = x @ (linear.weight + 0.7 * b @ a).T + linear.bias
    wanted = [x, layer.lora_A, layer.lora_B, linear.weight]
    assert_close(linear(x), expected)
    for got, want in zip(
        torch.autograd.grad((linear(x) * direction).sum(), wanted),
        torch.autograd.grad((expected * direction).sum(), wanted),
        strict=True,
    ):
        assert_close(got, want)


def test_starts_without_effect_and_keeps_the_inputs_dtype() -> None:
    linear, layer = nn.Linear(8, 6).to(torch.bfloat16), LoRA(8, 6, 3)
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    before = linear(x)
    linear.register_forward_hook(layer.after)
    assert torch.equal(linear(x), before) and linear(x).dtype == torch.bfloat16
    assert layer.lora_A.dtype == torch.float32 and not layer.lora_B.any() and layer.lora_A.std() > 0
