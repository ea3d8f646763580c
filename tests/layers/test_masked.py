"""Masked weights are and stay exactly zero, in every layer that has masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.masked import MaskedLinear, prunable
from peft_lightning.layers.prefix import Prefix


def lora_output(layer: nn.Module, h: Tensor) -> Tensor:
    assert isinstance(layer, LoRA)
    return layer.after(layer, (h,), torch.zeros(*h.shape[:-1], 6))


def prefix_output(layer: nn.Module, h: Tensor) -> Tensor:
    assert isinstance(layer, Prefix)
    keys = h.unflatten(-1, (2, 4)).transpose(1, 2)
    return torch.cat(layer.extend(keys, keys))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "bottleneck": (lambda: Bottleneck(8, 4, masked=True), lambda layer, h: layer(h)),
    "lora": (lambda: LoRA(8, 6, 4, masked=True), lora_output),
    "prefix": (lambda: Prefix(8, 3, masked=True), prefix_output),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_entries_stay_zero_through_decay_and_momentum(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, output = LAYERS[kind]
    layer = make()
    for parameter in prunable(layer).values():
        nn.init.normal_(parameter.weight)
        parameter.set_mask(torch.rand(parameter.weight.shape) < 0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output(layer, torch.randn(2, 3, 8)).float().square().sum().backward()
        for parameter in prunable(layer).values():
            weight, mask = parameter.weight, parameter.mask
            assert weight.grad is not None and mask is not None
            assert (weight.grad[~mask] == 0).all() and (weight.grad[mask] != 0).any()
        optimizer.step()
        optimizer.zero_grad()
    for parameter in prunable(layer).values():
        weight, mask = parameter.weight, parameter.mask
        assert mask is not None
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
        assert (optimizer.state[weight]["exp_avg_sq"][~mask] == 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_mask_works_in_the_forward_pass_whatever_is_stored(kind: str) -> None:
    torch.manual_seed(0)
    make, output = LAYERS[kind]
    layer, h = make(), torch.randn(2, 3, 8)
    for parameter in prunable(layer).values():
        nn.init.normal_(parameter.weight)
        parameter.set_mask(torch.rand(parameter.weight.shape) < 0.5)
    expected = output(layer, h)
    for parameter in prunable(layer).values():
        assert parameter.mask is not None
        with torch.no_grad():
            parameter.weight[~parameter.mask] = 7.0
    assert torch.equal(output(layer, h), expected)


def test_what_grows_with_the_inner_width() -> None:
    counted = {name: p.module.inner_unmasked for name, p in prunable(Bottleneck(8, 4)).items()}
    assert counted == {"adapter_down.0.weight": 4, "adapter_up.weight": 0}
    assert {p.module.inner_unmasked for layer in (LoRA(8, 6, 4), Prefix(8, 3)) for p in prunable(layer).values()} == {0}


def test_names_of_parameters_and_masks() -> None:
    assert list(prunable(LoRA(8, 6, 4))) == ["lora_A", "lora_B"]
    assert list(prunable(Prefix(8, 3))) == ["prefix_key", "prefix_value"]
    names = set(Bottleneck(8, 4, masked=True).state_dict())
    assert {"adapter_up.weight_mask", "adapter_down.0.weight_mask"} < names
    assert not [name for name in Bottleneck(8, 4).state_dict() if "mask" in name]


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"mask of shape \(2, 2\) does not fit weight"):
        prunable(MaskedLinear(8, 4, masked=True))["weight"].set_mask(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(UsageError, match="does not fit"):
        prunable(MaskedLinear(8, 4))["weight"].set_mask(torch.ones(4, 8, dtype=torch.bool))
