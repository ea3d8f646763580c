"""AdapterHub's fusion folders: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peft_lightning.errors import CheckpointError
from peft_lightning.files.adapterhub_fusion import read_fusion

SECTION: dict[str, Any] = {
    "dropout_prob": None,
    "key": True,
    "query": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
    "value_initialized": True,
}


def tensors(width: int = 4, prefix: str = "") -> dict[str, torch.Tensor]:
    """A fusion of two adapters at two sites."""
    found = {}
    for layer in range(2):
        site = f"{prefix}encoder.layer.{layer}.output.adapter_fusion_layer.one,two"
        for part, shape in (("query", (width, width)), ("key", (width, width)), ("value", (width, width))):
            found[f"{site}.{part}.weight"] = torch.randn(shape)
        for part in ("query", "key"):
            found[f"{site}.{part}.bias"] = torch.randn(width)
    return found


def folder_of(path: Path, given: dict[str, torch.Tensor], section: Any = SECTION, **changes: Any) -> Path:
    config = {"adapter_names": ["one", "two"], "config": section, "hidden_size": 4, "model_type": "bert", **changes}
    (path / "adapter_fusion_config.json").write_text(json.dumps(config))
    save_file(given, path / "model_adapter_fusion.safetensors")
    return path


def test_a_fusion_is_read(tmp_path: Path) -> None:
    given = tensors()
    found = read_fusion(folder_of(tmp_path, given, {**SECTION, "dropout_prob": 0.2}))
    assert found.names == ("one", "two") and found.dropout == 0.2
    assert found.sites == ("encoder.layer.0.output", "encoder.layer.1.output")
    assert found.base == {"model_type": "bert", "hidden_size": 4}
    assert found.tensors.keys() == given.keys()
    assert all(torch.equal(found.tensors[name], given[name]) for name in given)
    assert read_fusion(folder_of(tmp_path, given)).dropout is None


def test_a_model_with_a_head_has_its_name_before_the_tensors(tmp_path: Path) -> None:
    assert read_fusion(folder_of(tmp_path, tensors(prefix="bert."))).tensors.keys() == tensors().keys()


@pytest.mark.parametrize(
    ("option", "value"),
    [("value", False), ("residual_before", True), ("temperature", True), ("query_before_ln", True), ("query", False)],
)
def test_another_formula_is_refused(option: str, value: bool, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{option} = {value}: only {not value} can be represented here"):
        read_fusion(folder_of(tmp_path, tensors(), {**SECTION, option: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_names": ["one"]}, "must have config, hidden_size, model_type, and adapter_names of two or more"),
        ({"adapter_names": ["one", 2]}, "must have config"),
        ({"config": None}, "must have config"),
        ({"hidden_size": "4"}, "must have config"),
        ({"hidden_size": 5}, r"query.weight \(4, 4\), expected \(5, 5\)"),
        ({"adapter_names": ["one", "three"]}, "is no tensor of the fusion 'one,three'"),
    ],
)
def test_a_folder_that_does_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    section = changes.pop("config", SECTION)
    with pytest.raises(CheckpointError, match=message):
        read_fusion(folder_of(tmp_path, tensors(), section, **changes))


def test_tensors_that_lack_or_are_too_many_or_not_finite(tmp_path: Path) -> None:
    given = tensors()
    first = next(iter(given))
    with pytest.raises(CheckpointError, match="encoder.layer.0.output lacks some of query, key and value"):
        read_fusion(folder_of(tmp_path, {name: tensor for name, tensor in given.items() if name != first}))
    with pytest.raises(CheckpointError, match="pooler.weight is no tensor of the fusion"):
        read_fusion(folder_of(tmp_path, {**given, "pooler.weight": torch.ones(4)}))
    with pytest.raises(CheckpointError, match="finite"):
        read_fusion(folder_of(tmp_path, {**given, first: torch.full((4, 4), torch.nan)}))
    with pytest.raises(CheckpointError, match="there are none"):
        read_fusion(folder_of(tmp_path, {}))
