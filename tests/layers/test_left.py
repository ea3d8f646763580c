"""What a report says is left is what is left."""

from __future__ import annotations

import copy

import pytest

from peft_lightning.layers.left import left_lines, left_of, whole_of
from peft_lightning.layers.plan import PrunePlan, apply_plan
from peft_lightning.layers.prune_config import RankConfig
from peft_lightning.layers.pruned_heads import attention_sites
from tests.layers.test_pruned_heads import backbone
from tests.layers.test_unit_costs import counted


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_counts_are_those_of_the_model(family: str) -> None:
    grouped = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    model = backbone(family, grouped if family == "llama" else {"num_attention_heads": 4}, "eager")
    whole = whole_of(model, 7)
    before = {"parameters": sum(p.numel() for p in model.parameters()), "flops": counted(model, 7), "tokens": 7}
    unit = "head groups" if family == "llama" else "heads"
    assert whole == {**before, "unit": unit}
    paths = list(attention_sites(model))
    layers = [site.block for site in attention_sites(model).values()]
    plan = PrunePlan(
        heads=dict(zip(paths, ((1,), (0, 2, 3)), strict=True)),
        neurons={layers[1]: tuple(range(12))},
        ranks=dict(zip(layers, (2, 3), strict=True)),
        units=dict.fromkeys(paths, 4),
        inner={layers[1]: 32},
    )
    bare = copy.deepcopy(model)
    apply_plan(bare, plan, None)
    loras = apply_plan(model, plan, RankConfig())
    left = left_of(model, plan, whole)
    assert left["parameters"] == sum(p.numel() for p in bare.parameters())
    assert left["flops"] == counted(bare, 7)
    assert left["lora_parameters"] == sum(p.numel() for lora in loras.values() for p in lora.parameters())
    assert left["flops_share"] == left["flops"] / before["flops"] < 1
    lines = left_lines(left)
    assert lines[f"{unit} kept"] == "4 of 8   (by attention: 1 3)"
    assert lines["neurons kept"] == "12 of 32" and lines["LoRA ranks"] == "2 3"
    assert lines["operations left"] == f"{left['flops_share']:.1%} of the layers' on a text of 7 tokens"
