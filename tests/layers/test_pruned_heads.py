"""Removed heads and neurons leave the function that zeros in their place would, in every family."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lightning.backbones.build import as_backbone_config, build_backbone
from peft_lightning.backbones.families import FAMILIES
from peft_lightning.errors import UsageError
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites, prune_units
from tests.families import backbone_setting, inputs

# Enough heads that some can go, and groups of two query heads where keys are shared.
HEADS: dict[str, dict[str, Any]] = {
    "bart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{
        name: {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
        for name in ("llama", "qwen2", "qwen3")
    },
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, HEADS.get(family, {"num_attention_heads": 4})) for family in FAMILIES),
    ("deberta-v2", {"num_attention_heads": 4, "share_att_key": False}),
]
EACH = pytest.mark.parametrize(
    ("family", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else ""
)


def backbone(family: str, changes: dict[str, Any], attention: str = "auto") -> Any:
    setting = backbone_setting(family, attention=attention)
    setting["config"] = {**setting["config"], **changes}
    torch.manual_seed(0)
    built = build_backbone(as_backbone_config(setting)).eval()
    for parameter in built.parameters():  # biases start from 0, where a slip would not show
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return built


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(**inputs()).last_hidden_state)


def some(count: int, number: int) -> list[int]:
    """Another choice of units for every layer."""
    return sorted({(number + step) % count for step in (0, 2)})


@EACH
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_removing_equals_zeroing(family: str, changes: dict[str, Any], attention: str) -> None:
    if family == "deberta-v2" and attention == "sdpa":
        pytest.skip("has eager attention only")
    whole = backbone(family, changes, attention)
    zeroed, pruned = copy.deepcopy(whole), copy.deepcopy(whole)
    sites, blocks = attention_sites(whole), feed_forward_sites(whole)
    heads = {path: some(site.units, number) for number, (path, site) in enumerate(sites.items())}
    neurons = {path: list(range(number, site.units, 3)) for number, (path, site) in enumerate(blocks.items())}
    for path, site in sites.items():
        zero_columns(zeroed, site.linears()["output"], heads[path], site.width)
    for path, block in blocks.items():
        zero_columns(zeroed, block.outer, neurons[path], 1)
    prune_units(pruned, heads, neurons)
    assert_close(output(pruned), output(zeroed), rtol=1e-5, atol=1e-5)
    assert (output(pruned) - output(whole)).abs().max() > 1e-2
    gone = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in pruned.parameters())
    assert gone == expected_savings(whole, heads, neurons)


def zero_columns(model: Any, path: str, kept: list[int], width: int) -> None:
    weight = model.get_submodule(path).weight.data
    for column in range(weight.shape[1]):
        if column // width not in kept:
            weight[:, column] = 0


def expected_savings(model: Any, heads: dict[str, list[int]], neurons: dict[str, list[int]]) -> int:
    """Rows and columns, counted from the shapes by hand."""
    total = 0
    for path, site in attention_sites(model).items():
        gone = site.units - len(heads[path])
        layer = model.get_submodule(site.block)
        for name in (site.names.query, *site.names.positions):
            if name in dict(layer.named_modules()):
                linear = layer.get_submodule(name)
                total += gone * site.width * (linear.in_features + (linear.bias is not None))
        for name in (site.names.key, site.names.value):
            linear = layer.get_submodule(name)
            total += gone * site.key_width * (linear.in_features + (linear.bias is not None))
        total += gone * site.width * layer.get_submodule(site.names.output).out_features
    for path, block in feed_forward_sites(model).items():
        gone = block.units - len(neurons[path])
        for name in block.inner:
            linear = model.get_submodule(name)
            total += gone * (linear.in_features + (linear.bias is not None))
        total += gone * model.get_submodule(block.outer).out_features
    return total


@EACH
def test_it_trains_and_is_pruned_again(family: str, changes: dict[str, Any]) -> None:
    once, twice = backbone(family, changes), backbone(family, changes)
    path, site = next(iter(attention_sites(once).items()))
    assert site.units == 4
    prune_units(once, {path: [1]}, {})
    prune_units(twice, {path: [1, 2]}, {})
    assert attention_sites(twice)[path].units == 2
    prune_units(twice, {path: [0]}, {})
    assert_close(output(twice), output(once))
    once(**inputs()).last_hidden_state.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in once.parameters() if p.grad is not None)
    assert once.get_submodule(site.linears()["query"]).weight.grad.shape[0] == site.width


@EACH
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_layer_without_heads(family: str, changes: dict[str, Any], attention: str) -> None:
    model = backbone(family, changes, "eager" if family == "deberta-v2" else attention)
    path, site = next(iter(attention_sites(model).items()))
    if family == "deberta-v2":
        with pytest.raises(UsageError, match="the attention of deberta-v2 cannot run without a head"):
            prune_units(model, {path: []}, {})
        return
    zeroed = copy.deepcopy(model)
    zero_columns(zeroed, site.linears()["output"], [], site.width)
    prune_units(model, {path: []}, {site.block: []})
    zero_columns(zeroed, feed_forward_sites(zeroed)[site.block].outer, [], 1)
    assert_close(output(model), output(zeroed), rtol=1e-5, atol=1e-5)
    model(**inputs()).last_hidden_state.square().mean().backward()


def test_nothing_is_touched_unless_all_of_it_fits() -> None:
    model = backbone("bert", {"num_attention_heads": 4})
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = attention_sites(model)
    wrong: list[tuple[dict[str, list[int]], dict[str, list[int]], str]] = [
        ({first: [0], second: [4]}, {}, rf"{second}: the heads to keep must be numbers from 0 to 3"),
        ({first: [0], second: [1, 0]}, {}, "each once, in order"),
        ({first: [0], second: [1, 1]}, {}, "each once, in order"),
        ({first: [0], second: [True]}, {}, "must be numbers"),
        ({first: [0], "encoder.layer.9.attention.self": [0]}, {}, "has no heads there; there are: encoder.layer.0"),
        ({first: [0]}, {"encoder.layer.1": [99]}, "the neurons to keep must be numbers from 0 to 31"),
    ]
    for heads, neurons, message in wrong:
        with pytest.raises(UsageError, match=message):
            prune_units(model, heads, neurons)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}, "are one fused map"),
        ({"model_type": "t5", "d_model": 16, "num_layers": 1, "vocab_size": 40}, "positions' biases"),
    ],
)
def test_a_family_that_cannot_says_why(config: dict[str, Any], reason: str) -> None:
    from transformers import AutoConfig, AutoModel

    model: Any = AutoModel.from_config(AutoConfig.for_model(**config))
    with pytest.raises(UsageError, match=reason):
        attention_sites(model)


def test_an_attention_that_cannot_be_sliced_is_named() -> None:
    model = backbone("bert", {"num_attention_heads": 4})
    layer = model.encoder.layer[1]
    layer.attention.self.key = nn.Sequential(layer.attention.self.key)
    with pytest.raises(
        UsageError, match=r"encoder\.layer\.1\.attention\.self\.key: is a Sequential, not a plain linear"
    ):
        prune_units(model, {"encoder.layer.0.attention.self": [0]}, {})
    assert model.encoder.layer[0].attention.self.query.out_features == 16
    layer.attention.self.key = nn.Linear(16, 6)
    with pytest.raises(UsageError, match="heads of width 4 do not divide its maps"):
        attention_sites(model)
