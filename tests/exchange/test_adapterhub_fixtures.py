"""Adapters that AdapterHub's own library wrote: the same outputs here, and the same files again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_lightning import SparseAdapterModule, Task, load
from peft_lightning.errors import CheckpointError
from peft_lightning.exchange import export_adapter, import_adapter

pytestmark = pytest.mark.real_data
KINDS = ("double_seq_bn", "seq_bn", "seq_bn_bin", "par_bn", "lora")
CASES = [f"{family}/{kind}" for family in ("bert", "roberta") for kind in KINDS]
LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")
THREE = Task(name="three", text=("text",), kind="classify", labels=LABELS, metrics=("accuracy",))


@pytest.fixture
def fixtures(shared_data: Path) -> Path:
    folder = shared_data / "fixtures" / "adapterhub"
    if not folder.is_dir():
        pytest.skip(f"the fixtures are absent: {folder}")
    return folder


def imported(folder: Path, task: Any = "mrpc", **options: Any) -> SparseAdapterModule:
    backbone = {"name": str(folder.parent / "backbone"), "tokenizer": "toy"}
    return import_adapter(folder, task=task, backbone=backbone, **options)


def hidden(module: SparseAdapterModule, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
        state: torch.Tensor = module.backbone(**inputs).last_hidden_state
    return state


def assert_same_files(one: Path, other: Path, name: str = "adapter") -> None:
    state, again = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) and state[key].dtype == again[key].dtype for key in state)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_the_way_back(case: str, fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / case
    with pytest.warns(UserWarning, match="the head is new"):
        module = imported(folder, allow_bin=case.endswith("_bin"))
    expected = load_file(folder / "expected.safetensors")
    assert_close(hidden(module, expected), expected["last_hidden_state"], rtol=0, atol=1e-5)
    assert (expected["last_hidden_state"] - expected["without_adapter"]).abs().max() > 1e-3
    export_adapter(module, tmp_path / "out", format="adapterhub")
    if case.endswith("_bin"):
        with pytest.warns(UserWarning, match="the head is new"):
            again = import_adapter(tmp_path / "out", task="mrpc", backbone=module.backbone_config)
        assert torch.equal(hidden(again, expected), hidden(module, expected))
    else:
        assert_same_files(folder, tmp_path / "out")
    before, after = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert {**after, "model_name": before["model_name"]} == before
    assert {key: type(value) for key, value in after["config"].items()} == {
        key: type(value) for key, value in before["config"].items()
    }
    assert after["model_name"] == "backbone"  # no path of this machine
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter.safetensors", "adapter_config.json"}


def test_answers_on_a_backbone_with_few_positions(fixtures: Path, tmp_path: Path) -> None:
    """The fixtures' backbones have 40 positions, and RoBERTa's count from 2: less than a text may usually have."""
    for family, positions in (("bert", 40), ("roberta", 38)):
        backbone = {"name": str(fixtures / family / "backbone"), "tokenizer": "toy"}
        module = import_adapter(fixtures / family / "seq_bn", task="toy_sentiment", backbone=backbone)
        export_adapter(module, tmp_path / family, format="peft_lightning")
        assert load(tmp_path / family).max_length == positions
        assert load(tmp_path / family).predict(["the cat is good " * 20])[0]["label"]


def test_a_head_comes_along(fixtures: Path, tmp_path: Path) -> None:
    folder = fixtures / "bert" / "seq_bn_with_head"
    module = imported(folder, THREE)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        assert_close(module.head(hidden(module, expected)), expected["logits"], rtol=0, atol=1e-5)
    export_adapter(module, tmp_path / "out", format="adapterhub")
    assert_same_files(folder, tmp_path / "out")
    assert_same_files(folder, tmp_path / "out", "model_head")
    for file in ("adapter_config.json", "head_config.json"):
        before, after = (json.loads((place / file).read_text()) for place in (folder, tmp_path / "out"))
        assert {**after, "model_name": before["model_name"]} == before
    with pytest.raises(CheckpointError, match="its head has 3 outputs, the task mrpc has 2; import with a new head"):
        imported(folder)
    with pytest.warns(UserWarning, match="the head is new"):
        assert imported(folder, new_head=True).head.get_parameter("out.weight").shape == (2, 32)


def test_the_fusion_is_refused_and_its_parts_are_not(fixtures: Path) -> None:
    with pytest.raises(CheckpointError, match="is an AdapterFusion"):
        import_adapter(fixtures / "bert/fusion/fuse", task="mrpc", backbone=str(fixtures / "bert/backbone"))
    with pytest.warns(UserWarning, match="the head is new"):
        import_adapter(fixtures / "bert/fusion/one", task="mrpc", backbone=str(fixtures / "bert/backbone"))


def test_another_base_model_is_refused(fixtures: Path) -> None:
    with pytest.raises(CheckpointError, match="another backbone .model_type bert here roberta"):
        import_adapter(fixtures / "bert/seq_bn", task="mrpc", backbone=str(fixtures / "roberta/backbone"))
