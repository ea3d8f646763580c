"""Whatever happens to a model that is held still, it is afterwards what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_lightning.layers.still import held_still


def model() -> Any:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16).requires_grad_(False), nn.Dropout(0.5), nn.Linear(4, 2))
    parts[0].eval()
    parts[2].compile(backend="eager")
    return parts


def test_all_is_fp32_still_and_plain_inside_and_as_before_outside() -> None:
    parts = model()
    before = {name: tensor.clone() for name, tensor in parts.state_dict().items()}
    modes = [part.training for part in parts.modules()]
    with torch.autocast("cpu", dtype=torch.bfloat16), held_still(parts):
        assert not any(part.training for part in parts.modules())
        assert {p.dtype for p in parts.parameters()} == {torch.float32}
        assert not torch.is_autocast_enabled("cpu")
        plain = parts[2]._compiled_call_impl is None
        with torch.no_grad():
            parts[2].weight.zero_()
    assert plain and [part.training for part in parts.modules()] == modes
    assert parts[2]._compiled_call_impl is not None
    for name, tensor in parts.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_also_after_an_error() -> None:
    parts = model()
    before = parts[2].weight.detach().clone()

    def fail() -> None:
        with held_still(parts):
            parts[2].weight.data.zero_()
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert torch.equal(parts[2].weight, before) and parts[0].weight.dtype == torch.bfloat16
