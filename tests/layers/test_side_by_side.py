"""Each block of a batch gets what its own adapter alone would give it, gradients too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import UsageError
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.masked import prunable
from peft_lightning.layers.side_by_side import attach_side_by_side
from tests.families import CELLS, backbone_setting, inputs


def backbone(family: str) -> Any:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(**backbone_setting(family))).eval()


def group(bare: nn.Module, number: int, **options: Any) -> tuple[nn.Module, dict[str, Bottleneck]]:
    """A copy of the backbone with an adapter of its own, and the adapter's layers by site."""
    alone = copy.deepcopy(bare)
    masked = options.pop("masked", False)
    torch.manual_seed(10 + number)
    config = AdapterConfig(**{"kind": "pfeiffer", "bottleneck": 4, "init_std": 0.5, **options})
    layers = attach_adapters(alone, config, masked=masked)
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        for prune in prunable(layer).values() if masked else ():
            prune.set_mask(torch.rand(prune.weight.shape) < 0.5)
    return alone, {path.partition(".adapters.")[0]: layer for path, layer in layers.items()}  # type: ignore[misc]


def states(model: Any, times: int = 1) -> Tensor:
    hidden: Tensor = model(**{name: tensor.repeat(times, 1) for name, tensor in inputs(2, 5).items()}).last_hidden_state
    return hidden


@pytest.mark.parametrize(("family", "kind"), [cell for cell in CELLS if cell[1] in ("pfeiffer", "houlsby", "parallel")])
def test_blocks_equal_adapters_alone(family: str, kind: str) -> None:
    bare = backbone(family)
    alone = [group(bare, number, kind=kind, scaling=2.0) for number in range(3)]
    attach_side_by_side(bare, kind, [layers for _, layers in alone])
    together = states(bare, 3).chunk(3)
    for (model, _), block in zip(alone, together, strict=True):
        assert_close(block, states(model), rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        [{}, {"bottleneck": 7}],
        [{}, {"scaling": 3.0}],
        [{}, {"nonlinearity": "tanh"}],
        [{"nonlinearity": "gelu"}, {"nonlinearity": "gelu_new"}],
        [{"masked": True}, {"masked": True}],
        [{"masked": True}, {}],
    ],
    ids=["widths", "scalings", "nonlinearities", "gelus", "masks", "one mask"],
)
def test_gradients_are_those_of_each_alone(options: list[dict[str, Any]]) -> None:
    bare = backbone("bert").requires_grad_(False)
    alone = [group(bare, number, **option) for number, option in enumerate(options)]
    groups = [copy.deepcopy(layers) for _, layers in alone]
    attach_side_by_side(bare, "pfeiffer", groups)
    states(bare, 2).square().sum().backward()
    for model, _ in alone:
        states(model).square().sum().backward()
    for (_, own), shared in zip(alone, groups, strict=True):
        for path, layer in own.items():
            for name, parameter in layer.named_parameters():
                gradient = shared[path].get_parameter(name).grad
                assert gradient is not None and gradient.abs().max() > 0
                assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_observer_sees_both_sides_of_the_nonlinearity_and_changes_nothing() -> None:
    bare = backbone("bert")
    groups = [group(bare, number)[1] for number in range(2)]
    layers = attach_side_by_side(bare, "pfeiffer", groups)
    blind = states(bare, 2)
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for path, layer in layers.items():
        layer.observer = lambda before, after, path=path: seen.update({path: (before, after)})
    assert_close(states(bare, 2), blind, rtol=1e-5, atol=1e-6)
    assert seen.keys() == groups[0].keys()
    for before, after in seen.values():
        assert [tuple(part.shape) for part in before] == [(2, 5, 4), (2, 5, 4)]
        for one, other in zip(before, after, strict=True):
            assert (one < 0).any() and torch.equal(one.relu(), other)


def test_adapters_stay_submodules_of_their_own_models_only() -> None:
    bare = backbone("bert")
    names = set(bare.state_dict())
    attach_side_by_side(bare, "pfeiffer", [group(bare, 0)[1]])
    assert set(bare.state_dict()) == names


def test_computes_in_bfloat16_with_fp32_parameters() -> None:
    bare = backbone("bert")
    groups = [group(bare, number)[1] for number in range(2)]
    bare.to(torch.bfloat16)
    attach_side_by_side(bare, "pfeiffer", groups)
    hidden = states(bare, 2)
    hidden.float().sum().backward()
    weight = next(iter(groups[1].values())).adapter_up.weight
    assert hidden.dtype == torch.bfloat16 and weight.dtype == weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_a_batch_that_does_not_fall_into_blocks_is_refused() -> None:
    bare = backbone("bert")
    attach_side_by_side(bare, "pfeiffer", [group(bare, number)[1] for number in range(3)])
    with pytest.raises(UsageError, match="a batch of 2 rows does not fall into 3 blocks"):
        states(bare)


def test_other_sites_are_refused() -> None:
    bare = backbone("bert")
    both, first = group(bare, 0)[1], group(bare, 1, target=r"layer\.0\.")[1]
    with pytest.raises(UsageError, match=r"same sites of the backbone; encoder\.layer\.1\.output is not"):
        attach_side_by_side(bare, "pfeiffer", [both, first])
    houlsby = group(bare, 2, kind="houlsby")[1]
    with pytest.raises(UsageError, match=r"encoder\.layer\.0\.attention\.output is not"):
        attach_side_by_side(bare, "pfeiffer", [houlsby, houlsby])
