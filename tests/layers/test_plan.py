"""A plan survives its plain form, fits one backbone only, and is checked whole before anything is touched."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.layers.plan import PrunePlan, apply_plan
from peft_lightning.layers.prune_config import RankConfig
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites, prune_units
from tests.layers.test_pruned_heads import EACH, backbone, output, some
from tests.reference.adapted import oracle


def plan_for(model: Any, ranks: tuple[int, ...] = (2, 3, 1)) -> PrunePlan:
    sites, blocks = attention_sites(model), feed_forward_sites(model)
    return PrunePlan(
        heads={path: tuple(some(site.units, number)) for number, (path, site) in enumerate(sites.items())},
        neurons={path: tuple(range(1, site.units)) for path, site in blocks.items()},
        ranks={path: ranks[number % len(ranks)] for number, path in enumerate(blocks)},
        units={path: site.units for path, site in sites.items()},
        inner={path: site.units for path, site in blocks.items()},
    )


@EACH
def test_lora_of_each_rank_on_the_pruned_maps(family: str, changes: dict[str, Any]) -> None:
    model = backbone(family, changes)
    plan = plan_for(model)
    plain = copy.deepcopy(model)
    added = apply_plan(model, plan, RankConfig(scaling=0.7))
    prune_units(plain, plan.heads, plan.neurons)
    assert_close(output(model), output(plain))  # B is zero at first
    sites = attention_sites(model)
    assert len(added) == 4 * len(sites)
    for path, site in sites.items():
        for linear in site.linears().values():
            layer = added[f"{linear}.loras.pruned"]
            module: Any = model.get_submodule(linear)
            assert layer.lora_A.shape == (plan.ranks[site.block], module.in_features), path
            assert layer.lora_B.shape == (module.out_features, plan.ranks[site.block])
            torch.nn.init.normal_(layer.lora_B)
    tensors = {f"{path}.{name}": p.detach() for path, layer in added.items() for name, p in layer.named_parameters()}
    expected = output(oracle(plain, tensors, "lora", 0.7))
    assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    for path, layer in added.items():
        linear = model.get_submodule(path.partition(".loras.")[0])
        layer.merge(linear)
        once = linear.weight.clone()
        layer.merge(linear)
        assert torch.equal(linear.weight, once)
    assert_close(output(model), expected, rtol=1e-5, atol=1e-5)


def test_an_attention_without_heads_gets_no_lora() -> None:
    model = backbone("bert", {"num_attention_heads": 4})
    plan = plan_for(model)
    first = next(iter(plan.heads))
    added = apply_plan(model, replace(plan, heads={**plan.heads, first: ()}), RankConfig())
    assert len(added) == 4 and not any(path.startswith("encoder.layer.0") for path in added)


def test_the_plain_form_is_json_and_comes_back() -> None:
    plan = plan_for(backbone("bert", {"num_attention_heads": 4}))
    assert PrunePlan.of(json.loads(json.dumps(plan.plain())), "file") == plan
    assert plan.plain()["neurons"]["encoder.layer.0"] == "7fffffff"  # of 32, all but the first
    odd = replace(plan, neurons={"a": (0, 4, 5)}, inner={"a": 6})
    assert odd.plain()["neurons"] == {"a": "8c"} and PrunePlan.of(odd.plain(), "file") == odd


@pytest.mark.parametrize(
    "change",
    [
        lambda v: None,
        lambda v: [],
        lambda v: {**v, "more": 1},
        lambda v: {name: v[name] for name in v if name != "ranks"},
        lambda v: {**v, "heads": {"a": 3}},
        lambda v: {**v, "heads": {"a": [-1]}},
        lambda v: {**v, "heads": {"a": ["0"]}},
        lambda v: {**v, "heads": {3: [0]}},
        lambda v: {**v, "heads": 5},
        lambda v: {**v, "ranks": {"a": [4]}},
        lambda v: {**v, "ranks": {"a": True}},
        lambda v: {**v, "units": {"a": 1.5}},
        lambda v: {**v, "neurons": {}},
        lambda v: {**v, "neurons": {**v["neurons"], "encoder.layer.0": [1, 2]}},
        lambda v: {**v, "neurons": {**v["neurons"], "encoder.layer.0": "ff"}},
        lambda v: {**v, "neurons": {**v["neurons"], "encoder.layer.0": "gfffffff"}},
        lambda v: {**v, "inner": {path: 30 for path in v["inner"]}},
        lambda v: {**v, "inner": {path: 10**12 for path in v["inner"]}},
    ],
)
def test_a_malformed_plan(change: Any) -> None:
    good = plan_for(backbone("bert", {"num_attention_heads": 4})).plain()
    with pytest.raises(CheckpointError, match="file: damaged"):
        PrunePlan.of(change(good), "file")


def test_nothing_is_touched_unless_all_of_it_fits() -> None:
    model = backbone("bert", {"num_attention_heads": 4})
    before = {name: p.clone() for name, p in model.named_parameters()}
    good = plan_for(model)
    first, second = good.heads
    block = "encoder.layer.1"
    wrong: list[tuple[PrunePlan, str]] = [
        (replace(good, units={**good.units, second: 5}), "the plan is for attentions with heads"),
        (replace(good, heads={first: (0,)}), "the plan is for attentions with heads"),
        (replace(good, inner={**good.inner, block: 31}), "the plan is for layers with neurons"),
        (replace(good, inner={}), "does not say how many neurons"),
        (replace(good, ranks={block: 4}), "the plan has ranks for encoder.layer.1, not for the backbone's layers"),
        (replace(good, ranks={**good.ranks, block: 9}), r"rank 9 for encoder\.layer\.1\..*query: must be from 1 to 8"),
        (replace(good, ranks={**good.ranks, block: 0}), "rank 0 for .* must be from 1 to 8"),
        (replace(good, heads={**good.heads, second: (1, 9)}), "the heads to keep must be numbers from 0 to 3"),
        (replace(good, neurons={**good.neurons, block: (99,)}), "the neurons to keep must be numbers from 0 to 31"),
    ]
    for plan, message in wrong:
        with pytest.raises(UsageError, match=message):
            apply_plan(model, plan, RankConfig())
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
