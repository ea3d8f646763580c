"""What a unit costs is what the model loses with it; operations are those that PyTorch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites, prune_units
from peft_lightning.layers.unit_costs import layer_flops, unit_costs
from tests.layers.test_pruned_heads import EACH, backbone


@EACH
def test_parameters(family: str, changes: dict[str, Any]) -> None:
    model = backbone(family, changes)
    heads, neurons, total = unit_costs(model, "params", 5)
    assert total == sum(p.numel() for p in model.parameters())
    assert heads.keys() == attention_sites(model).keys() and neurons.keys() == feed_forward_sites(model).keys()
    path, block = list(heads)[-1], list(neurons)[-1]
    prune_units(model, {path: [0, 2, 3]}, {block: list(range(5, feed_forward_sites(model)[block].units))})
    assert total - sum(p.numel() for p in model.parameters()) == heads[path] + 5 * neurons[block]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_operations(family: str) -> None:
    changes = {"llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}}
    model = backbone(family, changes.get(family, {"num_attention_heads": 4}), "eager")
    heads, neurons, total = unit_costs(model, "flops", 7)
    before = counted(model, 7)
    assert total == layer_flops(model, 7) == before
    path, block = list(heads)[0], list(neurons)[0]
    prune_units(model, {path: [1, 3]}, {block: [0, 1]})
    gone = 2 * heads[path] + (32 - 2) * neurons[block]
    assert counted(model, 7) == before - gone == layer_flops(model, 7)


def counted(model: Any, tokens: int) -> int:
    mode: Any = FlopCounterMode(display=False)
    with mode, torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long))
    return int(mode.get_total_flops())
