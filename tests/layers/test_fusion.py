"""AdapterFusion: AdapterHub's own outputs, the formula token by token, and what trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import UsageError
from peft_lightning.files.adapterhub import read_adapterhub
from peft_lightning.files.adapterhub_fusion import read_fusion
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.fusion import AdapterFusion, attach_fusion, identity_penalty
from peft_lightning.layers.masked import MaskedLinear
from tests.reference import fusion as oracle
from tests.toy import tiny

INPUTS = {"input_ids": torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] > 0).long()


def backbone(**options: Any) -> Any:
    torch.manual_seed(0)
    config = {**tiny(0.0)["config"], **options}
    if config["model_type"] == "llama":
        config = {name: value for name, value in config.items() if "dropout" not in name}
    return build_backbone(BackboneConfig(config=config, tokenizer="toy")).eval()


def configs(*names: str, **options: Any) -> list[AdapterConfig]:
    return [AdapterConfig(**{"kind": "pfeiffer", "bottleneck": 4 + n, "init_std": 0.5, "name": name, **options})
            for n, name in enumerate(names)]  # fmt: skip


def states(model: nn.Module) -> Tensor:
    hidden: Tensor = model(**INPUTS).last_hidden_state
    return hidden


def shaken(fusions: Any) -> Any:
    """With random weights, biases too, so that nothing is by chance as it began."""
    torch.manual_seed(2)
    for fusion in fusions.values() if isinstance(fusions, dict) else [fusions]:
        for parameter in fusion.parameters():
            nn.init.normal_(parameter, std=0.5)
    return fusions


@pytest.mark.real_data
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_outputs_of_adapterhub(family: str, shared_data: Path) -> None:
    folder = shared_data / "fixtures" / "adapterhub" / family
    model = build_backbone(BackboneConfig(name=str(folder / "backbone"))).eval()
    given = read_fusion(folder / "fusion" / "fuse")
    adapters = [read_adapterhub(folder / "fusion" / name) for name in given.names]
    fusions = attach_fusion(model, [adapter.adapter for adapter in adapters], dropout=given.dropout)
    expected = load_file(folder / "fusion" / "expected.safetensors")
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    for tensors in (given.tensors, *(adapter.tensors for adapter in adapters)):
        with torch.no_grad():
            before = model(**inputs).last_hidden_state
        assert (before - expected["last_hidden_state"]).abs().max() > 1e-3
        assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    with torch.no_grad():
        assert_close(model(**inputs).last_hidden_state, expected["last_hidden_state"], rtol=0, atol=1e-5)
    assert tuple(path.partition(".adapter_fusion_layer")[0] for path in fusions) == given.sites
    own = {f"{path}.{name}" for path, fusion in fusions.items() for name in fusion.state_dict()}
    assert own == set(given.tensors)


def test_the_sum_is_the_formulas_token_by_token() -> None:
    torch.manual_seed(1)
    adapters = [Bottleneck(6, 2 + n, init_std=0.8, scaling=1.0 + n) for n in range(3)]
    fusion: AdapterFusion = shaken(AdapterFusion(6, adapters)).double()
    for adapter in adapters:
        adapter.double()
    hidden = torch.randn(2, 4, 6, dtype=torch.float64)
    assert_close(fusion(hidden), oracle.fused(hidden, adapters, fusion), rtol=1e-9, atol=1e-9)
    updates = torch.stack([adapter(hidden) - hidden for adapter in adapters], -2)
    shares = fusion.shares(hidden, updates)
    assert_close(shares.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert shares.std() > 0.01


def test_it_begins_as_a_mean_and_the_identity() -> None:
    torch.manual_seed(1)
    fusion = AdapterFusion(6, [Bottleneck(6, 2), Bottleneck(6, 3)])
    off = ~torch.eye(6, dtype=torch.bool)
    assert_close(fusion.value.weight.diagonal(), torch.ones(6), rtol=0, atol=0)
    assert_close(fusion.value.weight[off], torch.full((30,), 1e-6), rtol=0, atol=0)
    assert not fusion.query.bias.any() and not fusion.key.bias.any()
    assert {name for name, _ in fusion.named_parameters() if name.startswith("value")} == {"value.weight"}
    assert 0.005 < fusion.query.weight.std().item() < 0.05


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_two_adapters_that_are_the_same_are_one(kind: str) -> None:
    """Whatever the shares are; V is the identity but for 1e-6."""
    alone, both = backbone(), backbone()
    one = AdapterConfig(kind=kind, bottleneck=4, init_std=0.5, name="one")
    added = attach_adapters(alone, one)
    attach_fusion(both, [one, AdapterConfig(kind=kind, bottleneck=4, name="two")])
    for path, adapter in added.items():
        for name in ("one", "two"):
            both.get_submodule(path.replace(".one", f".{name}")).load_state_dict(adapter.state_dict())
    assert (states(alone) - states(backbone())).abs().max() > 1e-2
    assert_close(states(both), states(alone), rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "deberta-v2", "llama"])
def test_every_family_with_one_site_a_layer(model_type: str) -> None:
    model = backbone(model_type=model_type)
    before = states(model)
    fusions = attach_fusion(model, configs("one", "two"))
    assert len(fusions) == 2 and all(path.endswith("adapter_fusion_layer.one,two") for path in fusions)
    assert (states(model) - before).abs().max() > 1e-3


def test_only_the_fusion_trains() -> None:
    model = backbone().requires_grad_(False)
    fusions = attach_fusion(model, configs("one", "two"))
    (states(model).square().sum() + identity_penalty(fusions)).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".adapter_fusion_layer." in name}
    assert len(trained) == 2 * 5
    # BERT-base's numbers of the paper: 12 layers, 3 D^2 + 2 D each
    assert sum(p.numel() for fusion in fusions.values() for p in fusion.parameters()) == 2 * (3 * 32**2 + 2 * 32)


def test_the_penalty_is_the_distance_from_the_identity() -> None:
    fusions = shaken(attach_fusion(backbone(), configs("one", "two")))
    expected = 0.0
    for fusion in fusions.values():
        for row, values in enumerate(fusion.value.weight.tolist()):
            expected += sum((float(row == column) - value) ** 2 for column, value in enumerate(values))
    assert identity_penalty(fusions).item() == pytest.approx(0.01 * expected, rel=1e-5)
    assert identity_penalty(list(fusions.values()), weight=2.0).item() == pytest.approx(2 * expected, rel=1e-5)


def test_dropout_falls_on_scores() -> None:
    torch.manual_seed(1)
    adapters = [Bottleneck(6, 2, init_std=0.5), Bottleneck(6, 3, init_std=0.5)]
    fusion = shaken(AdapterFusion(6, adapters, dropout=1.0)).train()
    hidden = torch.randn(1, 3, 6)
    updates = torch.stack([adapter(hidden) - hidden for adapter in adapters], -2)
    assert_close(fusion.shares(hidden, updates), torch.full((1, 3, 2), 0.5))
    assert (fusion.eval().shares(hidden, updates) - 0.5).abs().max() > 0.01
    assert [
        f.dropout.p for f in attach_fusion(backbone(attention_probs_dropout_prob=0.3), configs("a", "b")).values()
    ] == [
        0.3,
        0.3,
    ]


def test_a_backbone_in_bfloat16() -> None:
    """The fusion stays float32 and computes in what it is given, with autocast and without."""
    model = backbone()
    attach_fusion(model, configs("one", "two", init_std=0.1))
    wide = states(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(states(model).float(), wide, rtol=0, atol=0.1)
    for name, parameter in model.named_parameters():
        if "adapter" not in name:
            parameter.data = parameter.data.bfloat16()
    found = states(model)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), wide, rtol=0, atol=0.1)


def test_masked_adapters_are_fused_as_they_are() -> None:
    """S-AF: what a mask removes has no part in the sum."""
    model = backbone()
    fusions = shaken(attach_fusion(model, configs("one", "two"), masked=True))
    full = states(model)
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            cast(Tensor, module.weight_mask).bernoulli_(0.4)
    pruned = states(model)
    assert (pruned - full).abs().max() > 1e-3
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            with torch.no_grad():
                module.weight.mul_(cast(Tensor, module.weight_mask))
            cast(Tensor, module.weight_mask).fill_(True)
    assert_close(states(model), pruned)
    assert len(fusions) == 2


def test_a_copy_has_its_own_adapters() -> None:
    model = backbone()
    shaken(attach_fusion(model, configs("one", "two")))
    other = copy.deepcopy(model)
    before = states(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(states(other), before, rtol=0, atol=0)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    assert len(list(model.named_parameters())) == len(set(model.state_dict()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (configs("one"), "fusion of pfeiffer: must be two adapters or more of one kind, houlsby or pfeiffer"),
        ([], "fusion of none: must be two adapters or more"),
        (
            [*configs("one"), AdapterConfig(name="two")],
            "fusion of pfeiffer, houlsby: must be two adapters or more of one",
        ),
        (configs("one", "two", kind="lora"), "fusion of lora, lora: must be two"),
        (configs("one", "two", kind="parallel"), "fusion of parallel, parallel: must be two"),
        (configs("one", "one"), "already has an adapter of this name"),
        (
            [*configs("one"), *configs("two", target=r"layer\.0")],
            "fusion of 2 adapters: .*layer.1.* has 1 of them only",
        ),
    ],
)
def test_what_cannot_be_fused(given: list[AdapterConfig], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attach_fusion(backbone(), given)
