"""Shared backbones: one memory for all, a structure for each, and the same initial values as without sharing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import SparseAdapterModule
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.backbones.sharing import sharing_backbones
from peft_lightning.errors import PeftLightningError
from tests.study.helpers import folder
from tests.toy import build, tiny


@pytest.fixture
def config(tmp_path: Path) -> BackboneConfig:
    return BackboneConfig(name=folder(tmp_path / "one"), tokenizer="toy")


def pointers(model: Any) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_the_memory_is_shared_and_the_structure_is_not(config: BackboneConfig) -> None:
    with sharing_backbones():
        one, other = build_backbone(config), build_backbone(config)
    assert pointers(one) == pointers(other)
    assert one.training and not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
    one.requires_grad_(False)
    one.get_submodule("encoder.layer.0").register_forward_hook(lambda module, args, output: output * 0)
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert not other.get_submodule("encoder.layer.0")._forward_hooks
    alone = build_backbone(config)
    assert not set(pointers(alone)) & set(pointers(one))
    for (name, value), (_, wanted) in zip(other.state_dict().items(), alone.state_dict().items(), strict=True):
        assert_close(value, wanted, rtol=0, atol=0, msg=name)


def test_other_settings_are_another_backbone(config: BackboneConfig) -> None:
    half = BackboneConfig(name=config.name, tokenizer="toy", dtype="bfloat16")
    with sharing_backbones():
        one, other = build_backbone(config), build_backbone(half)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert not set(pointers(one)) & set(pointers(other))


@pytest.mark.parametrize("random", [False, True])
def test_modules_begin_as_they_would_alone(tmp_path: Path, random: bool) -> None:
    setting = tiny(0.0) if random else {"name": folder(tmp_path / "one"), "tokenizer": "toy"}

    def state(seed: int) -> dict[str, torch.Tensor]:
        module = build(SparseAdapterModule, backbone=setting, seed=seed)
        module.configure_model()
        return dict(module.state_dict())

    wanted = {seed: state(seed) for seed in (1, 2)}
    with sharing_backbones():
        for seed in (1, 1, 2, 1, 2):
            for name, value in state(seed).items():
                assert_close(value, wanted[seed][name], rtol=0, atol=0, msg=f"{seed} {name}")


def test_what_trains_gets_memory_of_its_own(config: BackboneConfig) -> None:
    with sharing_backbones() as shared:
        one, other = build_backbone(config), build_backbone(config)
        one.requires_grad_(False)
        assert all(shared.shares(one.parameters()))
        layer: Any = one.get_submodule("encoder.layer.1")
        layer.requires_grad_(True)
        shared.release(one)
        for parameter in layer.parameters():
            assert shared.shares([parameter]) == [False]
            parameter.data.zero_()
        assert sum(shared.shares(one.parameters())) == len(list(one.parameters())) - len(list(layer.parameters()))
        shared.check()
    assert other.get_parameter("encoder.layer.1.output.dense.weight").abs().sum() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_bit_is_found(config: BackboneConfig, dtype: str) -> None:
    with sharing_backbones() as shared:
        one = build_backbone(BackboneConfig(name=config.name, tokenizer="toy", dtype=dtype))
        shared.check()
        weight = one.get_parameter("encoder.layer.0.output.dense.weight")
        with torch.no_grad():
            weight[0, 0] *= 1.01
        with pytest.raises(PeftLightningError, match=r"encoder.layer.0.output.dense.weight and 0 other tensors"):
            shared.check()
