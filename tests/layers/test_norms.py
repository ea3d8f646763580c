"""Trained norms are float32, whatever the backbone is held in, and compute what they did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from peft_lightning.backbones.build import as_backbone_config, build_backbone
from peft_lightning.backbones.families import FAMILIES
from peft_lightning.layers.norms import backbone_norms, train_in_float32
from tests.families import backbone_setting, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_is_found(family: str) -> None:
    model = build_backbone(as_backbone_config(backbone_setting(family)))
    found = {name for path, norm in backbone_norms(model).items() for name, _ in norm.named_parameters(prefix=path)}
    assert found == {name for name, p in model.named_parameters() if "norm" in name.lower()}
    assert found


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_in_a_bfloat16_backbone(family: str) -> None:
    plain = build_backbone(as_backbone_config(backbone_setting(family, dtype="bfloat16"))).eval()
    model = copy.deepcopy(plain)
    for norm in backbone_norms(model).values():
        train_in_float32(norm)
    model = copy.deepcopy(model)
    for norm in backbone_norms(model).values():
        assert all(p.dtype == torch.float32 for p in norm.parameters())
    output = model(**inputs()).last_hidden_state
    assert output.dtype == torch.bfloat16
    assert_close(output, plain(**inputs()).last_hidden_state, rtol=0.05, atol=0.1)
    assert model.state_dict().keys() == plain.state_dict().keys()
    output.float().square().sum().backward()
    assert all(norm.weight.grad is not None for norm in backbone_norms(model).values())


def test_in_float32_nothing_is_hooked() -> None:
    norm = nn.LayerNorm(4)
    train_in_float32(norm)
    assert not norm._forward_hooks and not norm._forward_pre_hooks


def test_the_computation_is_float32s() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8).to(torch.bfloat16)
    train_in_float32(norm)
    norm.weight.data.add_(1e-4 * torch.randn(8))  # which bfloat16 could not hold
    x = torch.randn(3, 8).to(torch.bfloat16)
    expected = nn.functional.layer_norm(x.float(), (8,), norm.weight, norm.bias).to(torch.bfloat16)
    assert torch.equal(norm(x), expected)
