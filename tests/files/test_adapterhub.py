"""AdapterHub's folders: legacy names, heads, masks, and everything that can be wrong with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.adapterhub import read_adapterhub, write_adapterhub
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.layers.adapters import AdapterConfig

SHAPES = {
    "adapter_down.0.weight": (4, 8),
    "adapter_down.0.bias": (4,),
    "adapter_up.weight": (8, 4),
    "adapter_up.bias": (8,),
}


def tensors(name: str = "n", layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"encoder.layer.{i}.output.adapters.{name}.{part}": torch.randn(shape, generator=generator)
        for i in range(layers)
        for part, shape in SHAPES.items()
    }


def adapter(**changes: Any) -> ForeignAdapter:
    values: dict[str, Any] = {
        "adapter": AdapterConfig(kind="pfeiffer", bottleneck=4, name="n"),
        "tensors": tensors(),
        "base": {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2, "model_name": "tiny"},
    }
    return ForeignAdapter(**{**values, **changes})


def head(layers: int = 2) -> dict[str, Tensor]:
    state = {"out.weight": torch.randn(3, 8), "out.bias": torch.randn(3)}
    return {"dense.weight": torch.randn(8, 8), "dense.bias": torch.randn(8), **state} if layers == 2 else state


def edit(folder: Path, file: str = "adapter_config.json", config: dict[str, Any] | None = None, **top: Any) -> None:
    content = json.loads((folder / file).read_text())
    content["config"] = {**content["config"], **(config or {})}
    content |= top
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


def rename(folder: Path, change: Any, file: str = "adapter.safetensors") -> None:
    save_file({change(key): tensor for key, tensor in load_file(folder / file).items()}, folder / file)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapterhub(tmp_path / "a", adapter())
    return tmp_path / "a"


def test_written_and_read_again(folder: Path) -> None:
    given = read_adapterhub(folder)
    assert given.adapter == AdapterConfig(kind="pfeiffer", bottleneck=4, name="n", scaling=1.0)
    assert_same(given.tensors, tensors())
    assert given.head is None and given.masks == {} and given.notes == ()
    assert given.base == {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_heads_of_one_and_two_layers(layers: int, model_type: str, tmp_path: Path) -> None:
    base = {**adapter().base, "model_type": model_type}
    written = adapter(head=head(layers), labels=("no", "maybe", "yes"), base=base)
    write_adapterhub(tmp_path, written)
    given = read_adapterhub(tmp_path)
    assert given.labels == ("no", "maybe", "yes") and given.head is not None and written.head is not None
    assert_same(given.head, written.head)
    assert_same(given.tensors, written.tensors)
    assert all(name.startswith(f"{model_type}.encoder.") for name in load_file(tmp_path / "adapter.safetensors"))
    assert read_adapterhub(tmp_path, with_head=False).head is None


def test_the_head_of_a_static_roberta_model(tmp_path: Path) -> None:
    write_adapterhub(tmp_path, adapter(head=head(), base={**adapter().base, "model_type": "roberta"}))
    names = {"1": "classifier.dense", "4": "classifier.out_proj"}
    rename(tmp_path, lambda key: f"{names[key.split('.')[2]]}.{key.split('.')[3]}", "model_head.safetensors")
    content = {"model_class": "RobertaForSequenceClassification", "config": None, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "head_config.json").write_text(json.dumps(content))
    given = read_adapterhub(tmp_path)
    assert given.labels == ("a", "b", "c") and given.head is not None
    assert given.head.keys() == head().keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_type": "tagging"}, "head_type = tagging.*--new_head"),
        ({"layers": 3}, "layers = 3.*must be 2 or 1"),
        ({"use_pooler": True}, "use_pooler = True"),
        ({"bias": False}, "bias = False"),
        ({"layers": True}, "layers = True.*must be 2 or 1"),
        ({"bias": 1}, "bias = 1"),
        ({"activation_function": "relu"}, "activation_function = relu.*must be tanh"),
        ({"layers": 1}, "missing: none; unexpected: heads.n.4"),
    ],
)
def test_heads_that_are_not_ours(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_adapterhub(tmp_path, adapter(head=head()))
    edit(tmp_path, "head_config.json", config)
    with pytest.raises(CheckpointError, match=message):
        read_adapterhub(tmp_path)
    assert read_adapterhub(tmp_path, with_head=False).head is None


def test_incomplete_heads(tmp_path: Path) -> None:
    write_adapterhub(tmp_path, adapter(head=head()))
    edit(tmp_path, "head_config.json", config={}, model_class="BertForSequenceClassification")
    content = json.loads((tmp_path / "head_config.json").read_text())
    (tmp_path / "head_config.json").write_text(json.dumps({**content, "config": None}))
    with pytest.raises(CheckpointError, match="model_class = 'BertForSequenceClassification': this head is not ours"):
        read_adapterhub(tmp_path)
    (tmp_path / "model_head.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither model_head.safetensors nor pytorch_model_head.bin"):
        read_adapterhub(tmp_path)
    (tmp_path / "model_head.safetensors").write_bytes(b"")
    (tmp_path / "head_config.json").unlink()
    with pytest.raises(CheckpointError, match="head_config.json: missing or damaged"):
        read_adapterhub(tmp_path)


def test_masks_travel_beside_the_zeros(tmp_path: Path) -> None:
    state = tensors()
    masks = {name: torch.rand(t.shape) < 0.5 for name, t in state.items() if name.endswith("weight")}
    for name, mask in masks.items():
        state[name] = state[name] * mask
    write_adapterhub(tmp_path, adapter(tensors=state, masks=masks, head=head()))
    given = read_adapterhub(tmp_path)
    assert_same(given.masks, masks)
    assert_same(given.tensors, state)
    written = tmp_path / "peft_lightning_masks.safetensors"
    assert written.stat().st_size < 700
    whole = written.read_bytes()
    rename(tmp_path, lambda key: key)
    changed = load_file(tmp_path / "adapter.safetensors")
    save_file({name: tensor + 1 for name, tensor in changed.items()}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="values where its mask removed them.*delete this file"):
        read_adapterhub(tmp_path)
    written.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="masks.safetensors: damaged"):
        read_adapterhub(tmp_path)
    gone = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    masks = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    write_adapterhub(tmp_path, adapter(tensors=gone, masks=masks))
    with pytest.raises(CheckpointError, match="peft_lightning_masks.safetensors: removes every weight"):
        read_adapterhub(tmp_path)
    save_file({"ghost_mask": torch.tensor([True])}, written)
    with pytest.raises(CheckpointError, match="ghost_mask is the mask of no tensor"):
        read_adapterhub(tmp_path)


@pytest.mark.parametrize("old", ["layer_text_task_adapters", "layer_text_lang_adapters"])
def test_old_names(old: str, folder: Path) -> None:
    rename(folder, lambda key: "bert." + key.replace(".adapters.", f".{old}."))
    assert_same(read_adapterhub(folder).tensors, tensors())


def test_old_names_in_attention_and_an_odd_name(tmp_path: Path) -> None:
    state = tensors() | {k.replace("output", "attention.output"): v for k, v in tensors().items()}
    write_adapterhub(tmp_path, adapter(tensors=state, adapter=AdapterConfig(bottleneck=4, name="n")))
    new = {
        "attention.output.adapters.": "attention.output.attention_text_task_adapters.",
        "output.adapters.": "output.layer_text_task_adapters.",
    }

    def old(key: str) -> str:
        for now, then in new.items():
            if now in key:
                return key.replace(now, then).replace(".n.", ".sst-2.")
        raise AssertionError(key)

    rename(tmp_path, old)
    edit(tmp_path, name="sst-2", version="absent")
    given = read_adapterhub(tmp_path)
    assert given.adapter.name == "sst-2" and given.notes == () and given.adapter.kind == "houlsby"
    assert_same(given.tensors, {key.replace(".n.", ".sst-2."): tensor for key, tensor in state.items()})


def test_two_tensors_of_one_name(folder: Path) -> None:
    state = load_file(folder / "adapter.safetensors")
    save_file(state | {f"bert.{key}": tensor.clone() for key, tensor in state.items()}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="two tensors of one name"):
        read_adapterhub(folder)


@pytest.mark.parametrize("claim", [{"inv_adapter": "nice"}, {"invertible_adapter": {"block_type": "nice"}}])
def test_inverse_adapters(claim: dict[str, Any], folder: Path) -> None:
    edit(folder, config=claim)
    with pytest.raises(CheckpointError, match="inv.* = .*nice.*cannot be represented"):
        read_adapterhub(folder)
    edit(folder, type="text_task")
    assert "never used any" in read_adapterhub(folder).notes[0]
    state = load_file(folder / "adapter.safetensors")
    save_file({**state, "invertible_adapters.n.F.0.weight": torch.ones(2, 2)}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="inverse adapters cannot be represented"):
        read_adapterhub(folder)


@pytest.mark.parametrize("model_type", ["distilbert", None, ["bert"]])
def test_other_families_are_refused(model_type: Any, folder: Path) -> None:
    edit(folder, model_type=model_type)
    with pytest.raises(CheckpointError, match="model_type = .*bert and roberta only"):
        read_adapterhub(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"reduction_factor": 4}}, "8 tensors differ|6 tensors differ"),
        ({"hidden_size": 16}, "tensors differ from adapter_config.json"),
        ({"hidden_size": "8"}, "hidden_size = 8: must be a whole number"),
        ({"hidden_size": "absent"}, "hidden_size = None"),
        ({"name": "m"}, "no tensor of the adapter 'm'"),
    ],
)
def test_tensors_and_configuration_must_agree(change: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        read_adapterhub(folder)


def test_tensors_of_something_else(folder: Path) -> None:
    save_file({"encoder.layer.0.prefix_tunings.n.x": torch.ones(1)}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="prefix_tunings.n.x is no tensor of the adapter 'n'"):
        read_adapterhub(folder)
    save_file({k: t for k, t in tensors().items() if k.endswith("bias")}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="a: the tensors differ from adapter_config.json: there are biases only"):
        read_adapterhub(folder)
    save_file({}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="there are none"):
        read_adapterhub(folder)
    save_file({"x": torch.ones(1, dtype=torch.int64)}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="'x' is torch.int64; must be"):
        read_adapterhub(folder)


def test_a_wrong_rank(tmp_path: Path) -> None:
    state = {
        f"encoder.layer.{i}.attention.self.{m}.loras.n.{x}": torch.ones(shape)
        for i in range(2)
        for m in ("query", "value")
        for x, shape in (("lora_A", (2, 8)), ("lora_B", (8, 2)))
    }
    write_adapterhub(tmp_path, adapter(tensors=state, adapter=AdapterConfig(kind="lora", bottleneck=2, name="n")))
    assert_same(read_adapterhub(tmp_path).tensors, state)
    edit(tmp_path, config={"r": 3})
    with pytest.raises(CheckpointError, match="has not the rank 3"):
        read_adapterhub(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000, b"\xff"])
def test_damaged_configurations(content: bytes, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="adapter_config.json: (missing or damaged|holds no mapping)"):
        read_adapterhub(folder)


def test_damaged_and_missing_tensors(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="adapter.safetensors: damaged or not readable"):
        read_adapterhub(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="holds neither adapter.safetensors nor pytorch_adapter.bin"):
        read_adapterhub(folder)


def test_pickles_only_on_request_and_only_tensors(folder: Path) -> None:
    path = folder / "pytorch_adapter.bin"
    torch.save(load_file(folder / "adapter.safetensors"), path)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(UsageError, match="is a pickle, which import and merge read with --allow_bin"):
        read_adapterhub(folder)
    assert_same(read_adapterhub(folder, allow_bin=True).tensors, tensors())

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    path.write_bytes(pickle.dumps({"x": Evil()}, protocol=2))
    with pytest.raises(CheckpointError, match="damaged or not readable"):
        read_adapterhub(folder, allow_bin=True)
    assert not (folder / "ran").exists()
    for content, message in (([1], "holds a list"), ({"x": 1}, "'x' is int"), ({1: torch.ones(1)}, "1 is torch")):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_adapterhub(folder, allow_bin=True)
    torch.save({"x": torch.ones(2, 2).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="names torch._utils._rebuild_sparse_tensor"):
        read_adapterhub(folder, allow_bin=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    for file, name in (
        ("adapter.safetensors", "bert.encoder.layer.1.output.adapters.n.adapter_up.bias"),
        ("model_head.safetensors", "heads.n.4.bias"),
    ):
        write_adapterhub(tmp_path, adapter(head=head()))
        state = load_file(tmp_path / file)
        state[name][1] = value
        save_file(state, tmp_path / file)
        with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
            read_adapterhub(tmp_path)


def test_how_masks_were_made_travels_with_them(tmp_path: Path) -> None:
    masks = {name: torch.rand(t.shape) < 0.5 for name, t in tensors().items() if name.endswith("weight")}
    state = {name: t * masks.get(name, torch.tensor(True)) for name, t in tensors().items()}
    prune = {"sparsity": 0.5, "score": "grasp"}
    write_adapterhub(tmp_path, adapter(tensors=state, masks=masks, prune=prune))
    file = tmp_path / "peft_lightning_masks.safetensors"
    payload = file.read_bytes()
    assert read_adapterhub(tmp_path).prune == prune
    for _ in range(8):  # the same bytes every time
        write_adapterhub(tmp_path, adapter(tensors=state, masks=masks, prune=dict(reversed(prune.items()))))
        assert file.read_bytes() == payload
    write_adapterhub(tmp_path, adapter(tensors=state, masks=masks))
    assert read_adapterhub(tmp_path).prune == {}
    with safe_open(file, "pt") as opened:
        index = json.loads(opened.metadata()["peft_lightning_packed"])
    changed = {"tensors": index["tensors"], "record": [1]}
    save_file(load_file(file), file, {"peft_lightning_packed": json.dumps(changed)})
    with pytest.raises(CheckpointError, match="masks.safetensors: damaged .*record that is no mapping"):
        read_adapterhub(tmp_path)


def test_facts_of_the_base_model_are_checked_before_the_rest_is_read(tmp_path: Path) -> None:
    write_adapterhub(tmp_path, adapter(tensors={name: t * float("nan") for name, t in tensors().items()}))
    (tmp_path / "peft_lightning_masks.safetensors").write_bytes(b"damaged")
    edit(tmp_path, config={"ln_before": True})
    facts: list[dict[str, Any]] = []
    with pytest.raises(CheckpointError, match="not finite"):
        read_adapterhub(tmp_path, check=facts.append)
    assert facts == [{"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2}]


def test_halves_are_read_as_fp32(folder: Path) -> None:
    halves = {key: tensor.half() for key, tensor in load_file(folder / "adapter.safetensors").items()}
    save_file(halves, folder / "adapter.safetensors")
    assert_same(read_adapterhub(folder).tensors, {key: tensor.float() for key, tensor in halves.items()})


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="type 'electra': AdapterHub's format is written for bert and roberta"):
        write_adapterhub(tmp_path, adapter(base={**adapter().base, "model_type": "electra"}))
    with pytest.raises(CheckpointError, match="'mam': AdapterHub's format keeps the prefixes"):
        write_adapterhub(tmp_path, adapter(adapter=AdapterConfig(kind="mam")))
    uneven = tensors() | {"encoder.layer.1.attention.output.adapters.n.adapter_up.bias": torch.ones(8)}
    with pytest.raises(CheckpointError, match="other places in some layers"):
        write_adapterhub(tmp_path, adapter(tensors=uneven))
    with pytest.raises(CheckpointError, match="x: AdapterHub's format has no adapter there"):
        write_adapterhub(tmp_path, adapter(tensors={"x": torch.ones(1)}))


def test_left_out_layers_come_back(tmp_path: Path) -> None:
    state = {
        key: tensor for key, tensor in tensors(layers=4).items() if ".layer.1." not in key and ".layer.3." not in key
    }
    write_adapterhub(tmp_path, adapter(tensors=state, base={**adapter().base, "num_hidden_layers": 4}))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["config"]["leave_out"] == [1, 3]
    given = read_adapterhub(tmp_path)
    assert given.base["num_hidden_layers"] == 4
    assert given.adapter.target == r"^encoder\.layer\.(0|2)\.(output)$"
    write_adapterhub(tmp_path / "all", adapter(base={**adapter().base, "num_hidden_layers": 2}))
    path = tmp_path / "all" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"]["leave_out"] = [0]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0.* is where the configuration has no adapter"):
        read_adapterhub(tmp_path / "all")


def test_a_mask_that_was_changed(tmp_path: Path) -> None:
    """Its tensor fits a mask that keeps more, so only the digest tells."""
    masks = {name: torch.rand(t.shape) < 0.5 for name, t in tensors().items() if name.endswith("weight")}
    state = {name: t * masks.get(name, torch.tensor(True)) for name, t in tensors().items()}
    write_adapterhub(tmp_path, adapter(tensors=state, masks=masks))
    file = tmp_path / "peft_lightning_masks.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-2] = 0xFF if payload[-2] != 0xFF else 0
    file.write_bytes(payload)
    with pytest.raises(CheckpointError, match="masks.safetensors: damaged .the SHA-256 in the index"):
        read_adapterhub(tmp_path)
