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


@pytest.mark.parametrize(
    ("changes", "compared"),
    [
        ({}, 2 * (2 * 4)),
        ({"share_att_key": False}, 2 * (2 * 4)),
        ({"pos_att_type": ["c2p"]}, 2 * 4),
        ({"position_buckets": -1, "max_relative_positions": 9, "pos_att_type": ["p2c"]}, 2 * 9),
        ({"pos_att_type": []}, 0),
        ({"relative_attention": False}, 0),
    ],
    ids=str,
)
def test_operations_of_relative_positions(changes: dict[str, Any], compared: int) -> None:
    """What a second text adds: the positions themselves are projected once a batch."""
    model = backbone("deberta-v2", {"num_attention_heads": 4, **changes})
    heads, neurons, total = unit_costs(model, "flops", 7)
    layer = 4 * (4 * (2 * 7 * 16 * 4) + 4 * 7 * 7 * 4 + 2 * 7 * compared * 4) + 2 * (2 * 7 * 16 * 32)  # by hand
    assert total == counted(model, 7, 2) - counted(model, 7) == 2 * layer
    path, block = list(heads)[0], list(neurons)[0]
    prune_units(model, {path: [1, 3]}, {block: [0, 1]})
    gone = 2 * heads[path] + (32 - 2) * neurons[block]
    assert counted(model, 7, 2) - counted(model, 7) == total - gone == layer_flops(model, 7)


def counted(model: Any, tokens: int, texts: int = 1) -> int:
    mode: Any = FlopCounterMode(display=False)
    with mode, torch.no_grad():
        model(input_ids=torch.ones(texts, tokens, dtype=torch.long))
    return int(mode.get_total_flops())
