"""Out and in again for every kind, masks and heads kept; what an imported module can do; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_lightning import FineTuneModule, SparseAdapterModule, load
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.exchange import export_adapter, import_adapter
from peft_lightning.files.adapterhub import read_adapterhub
from peft_lightning.files.foreign import write_folder
from peft_lightning.files.manifest import write_adapter
from tests.toy import build, data, tiny, trainer


def pruned(kind: str = "houlsby", sparsity: float = 0.4, **options: Any) -> SparseAdapterModule:
    """A module with random masks and no zero left in what they keep."""
    adapter = {"kind": kind, "bottleneck": 3, "name": "mine", **options.pop("adapter", {})}
    module: SparseAdapterModule = build(
        SparseAdapterModule, adapter=adapter, prune={"sparsity": sparsity, "score": "random"}, **options
    )
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters().values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    if sparsity:
        module.install_masks(())
    return module.eval()


def logits(module: SparseAdapterModule) -> torch.Tensor:
    inputs = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    with torch.no_grad():
        return module(inputs)


def again(folder: Path, **options: Any) -> SparseAdapterModule:
    return import_adapter(folder, **{"task": "toy_sentiment", "backbone": tiny(), **options})


def assert_same_state(one: SparseAdapterModule, other: SparseAdapterModule, name: str = "mine") -> None:
    state = {key.replace(f".{name}.", ".mine."): tensor for key, tensor in one.owned_state().items()}
    assert state.keys() == other.owned_state().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in other.owned_state().items())


@pytest.mark.parametrize("sparsity", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "lora"])
def test_adapterhub_there_and_back(kind: str, sparsity: float, tmp_path: Path) -> None:
    module = pruned(kind, sparsity, adapter={"scaling": 1.7, "nonlinearity": "gelu"})
    export_adapter(module, tmp_path / "out", format="adapterhub")
    back = again(tmp_path / "out")
    assert_same_state(back, module)
    assert torch.equal(logits(back), logits(module))
    ours, theirs = module.summary(), back.summary()
    assert {key: theirs[key] for key in ours if key != "adapters"} == {k: v for k, v in ours.items() if k != "adapters"}
    if sparsity:
        assert back.prune == module.prune and back.prune.score == "random"
    export_adapter(back, tmp_path / "again", format="adapterhub")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("target", [r"layer\.1\.", r"\.attention\.output$", r"\.\d\.output$"])
def test_chosen_places_there_and_back(target: str, tmp_path: Path) -> None:
    module = pruned(adapter={"target": target})
    export_adapter(module, tmp_path / "out", format="adapterhub")
    assert_same_state(again(tmp_path / "out"), module)


def test_large_sparse_keeps_its_width_and_its_scaling(tmp_path: Path) -> None:
    module = build(SparseAdapterModule, adapter={"kind": "lora", "bottleneck": 2, "scaling": 0.5, "name": "mine"},
                   prune={"multiplier": 4, "score": "random"})  # fmt: skip
    module.configure_model()
    module.install_masks(())
    export_adapter(module.eval(), tmp_path / "out", format="adapterhub")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())["config"]
    assert (config["r"], config["alpha"]) == (8, 4)
    back = again(tmp_path / "out")
    assert (back.prune.multiplier, back.adapter.bottleneck, back.prune.sparsity) == (4, 2, None)
    assert back.summary()["trained_parameters"] == module.summary()["trained_parameters"]
    assert_same_state(back, module)
    assert torch.equal(logits(back), logits(module))


def edit_masks(folder: Path, prune: dict[str, Any]) -> None:
    given = read_adapterhub(folder)
    write_folder(folder, {}, given.masks, prune)


def test_masks_without_a_record_are_given(tmp_path: Path) -> None:
    module = pruned()
    export_adapter(module, tmp_path / "out", format="adapterhub")
    edit_masks(tmp_path / "out", {})
    back = again(tmp_path / "out")
    assert_same_state(back, module)
    assert (back.prune.score, back.summary()["score"]) == ("given", "given")
    assert back.prune.sparsity == pytest.approx(1 - module.summary()["kept_share"])
    export_adapter(back, tmp_path / "again", format="adapterhub")
    assert again(tmp_path / "again").prune == back.prune
    trainer(max_steps=2).fit(back, datamodule=data())
    assert back.summary()["kept_weights"] == module.summary()["kept_weights"]


def test_masks_before_the_fit_that_makes_them(tmp_path: Path) -> None:
    """Nothing is removed yet, and the setting says what will be."""
    module = build(SparseAdapterModule, adapter={"bottleneck": 3, "name": "mine"}, prune={"score": "random"})
    export_adapter(module, tmp_path / "out", format="adapterhub")
    back = again(tmp_path / "out")
    assert back.prune == module.prune and back.summary()["kept_share"] == 1.0
    edit_masks(tmp_path / "out", {})
    assert not again(tmp_path / "out").prune.active


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"score": "best"}, "prune.score = 'best'"),
        ({"sparsity": "0.4"}, "prune.sparsity = '0.4'"),
        ({"ghost": 1}, "ghost"),
        ({"sparsity": 0.9}, "sparsity = 0.9, and .* weights are removed"),
        ({"sparsity": 0.0}, "sparsity = 0.0, and .* weights are removed"),
        ({"multiplier": 4}, "multiplier = 4, and the bottleneck is 3"),
    ],
)
def test_a_record_that_does_not_belong_to_the_masks(prune: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_adapter(pruned(), tmp_path / "out", format="adapterhub")
    edit_masks(tmp_path / "out", prune)
    with pytest.raises(CheckpointError, match=f"out: the record of how its masks were made.*{message}"):
        again(tmp_path / "out")


@pytest.mark.parametrize("name", ["sst-2", "a dash-and spaces", "ä", "2nd"])
def test_names_that_are_no_identifiers_stay(name: str, tmp_path: Path) -> None:
    export_adapter(pruned(adapter={"name": name}), tmp_path / "one", format="adapterhub")
    back = again(tmp_path / "one")
    assert back.adapter.name == name
    export_adapter(back, tmp_path / "two", format="adapterhub")
    assert (
        load_file(tmp_path / "one/adapter.safetensors").keys() == load_file(tmp_path / "two/adapter.safetensors").keys()
    )


@pytest.mark.parametrize("format", ["adapterhub", "peft"])
def test_the_base_model_is_compared_before_masks_and_tensors_are_read(format: str, tmp_path: Path) -> None:
    export_adapter(pruned("lora"), tmp_path / "out", format=format, head=False)
    file = next((tmp_path / "out").glob("adapter*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    (tmp_path / "out" / "peft_lightning_masks.safetensors").write_bytes(b"damaged")
    backbone = {**tiny(), "config": {**tiny()["config"], "num_hidden_layers": 4, "hidden_size": 64}}
    with pytest.raises(CheckpointError, match="hidden_size 32 here 64.*num_hidden_layers 2 here 4"):
        again(tmp_path / "out", backbone=backbone)


@pytest.mark.parametrize("head", ["dense", "linear"])
def test_both_heads_there_and_back(head: str, tmp_path: Path) -> None:
    module = pruned(head=head)
    export_adapter(module, tmp_path / "out", format="adapterhub")
    back = again(tmp_path / "out")
    assert back.head_style == head and torch.equal(logits(back), logits(module))
    with pytest.raises(UsageError, match="head = .*: the folder's head is"):
        again(tmp_path / "out", head="linear" if head == "dense" else "dense")


def test_an_imported_module_trains_saves_loads_and_leaves_again(tmp_path: Path) -> None:
    module = pruned()
    export_adapter(module, tmp_path / "one", format="adapterhub", head=False)
    with pytest.warns(UserWarning, match="the head is new, so train it before use"):
        back = again(tmp_path / "one", optim={"lr": 1e-2})
    masks = {name: parameter.mask.clone() for name, parameter in back.prunable().items() if parameter.mask is not None}
    assert masks and not (tmp_path / "one" / "model_head.safetensors").exists()
    export_adapter(back, tmp_path / "untrained", format="adapterhub")
    assert not (tmp_path / "untrained" / "model_head.safetensors").exists()
    trainer(tmp_path / "run", max_steps=3).fit(back, datamodule=data())
    for name, parameter in back.prunable().items():
        assert parameter.mask is not None and torch.equal(parameter.mask, masks[name])
        assert (parameter.weight[~masks[name]] == 0).all()
    loaded = load(tmp_path / "run" / "last.ckpt")
    assert torch.equal(logits(loaded), logits(back.eval()))
    export_adapter(tmp_path / "run" / "last.ckpt", tmp_path / "two", format="adapterhub")
    assert (tmp_path / "two" / "model_head.safetensors").exists()
    assert_same_state(again(tmp_path / "two"), back)
    write_adapter(tmp_path / "ours", back.owned_state(), back.manifest())
    assert_same_state(load(tmp_path / "ours"), back)


def test_our_own_folder_as_a_target(tmp_path: Path) -> None:
    module = pruned("mam")
    export_adapter(module, tmp_path / "ours", format="peft_lightning")
    assert_same_state(load(tmp_path / "ours"), module)
    with pytest.raises(UsageError, match="head = False: format = 'peft_lightning' always has the head"):
        export_adapter(module, tmp_path / "b", format="peft_lightning", head=False)
    with pytest.raises(CheckpointError, match="adapter.kind = 'mam': AdapterHub"):
        export_adapter(module, tmp_path / "b", format="adapterhub")
    with pytest.raises(CheckpointError, match="adapter.kind = 'mam': PEFT"):
        export_adapter(module, tmp_path / "b", format="peft")
    assert not (tmp_path / "b").exists() and {path.name for path in tmp_path.iterdir()} == {"ours"}


@pytest.mark.parametrize("kind", ["houlsby", "lora", "mam"])
def test_our_own_folder_takes_the_room_it_may_take(kind: str, tmp_path: Path) -> None:
    """(1 - s) x the prunable bytes + all other bytes + 1 bit per prunable weight + 16 KB, with everything in it."""
    backbone = {**tiny(), "config": {**tiny()["config"], "num_hidden_layers": 24}}
    module = pruned(kind, 0.4, backbone=backbone, adapter={"bottleneck": 16})
    export_adapter(module, tmp_path / "ours", format="peft_lightning")
    summary = module.summary()
    state = module.owned_state().values()
    other = sum(tensor.nbytes for tensor in state if tensor.dtype != torch.bool) - 4 * summary["prunable_weights"]
    written = sum(path.stat().st_size for path in (tmp_path / "ours").iterdir())
    assert written <= 4 * summary["kept_weights"] + other + summary["prunable_weights"] / 8 + 16 * 1024


def test_options_that_are_refused(tmp_path: Path) -> None:
    module = pruned()
    with pytest.raises(UsageError, match="'ghost': must be one of adapterhub, peft, peft_lightning, transformers"):
        export_adapter(module, tmp_path / "a", format="ghost")
    with pytest.raises(UsageError, match="'onnx': SparseAdapterModule can be written as adapterhub, peft, peft_light"):
        export_adapter(module, tmp_path / "a", format="onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="full: exists already and is not empty"):
        export_adapter(module, tmp_path / "full", format="adapterhub")
    (tmp_path / "empty").mkdir()
    export_adapter(module, tmp_path / "empty", format="adapterhub")
    assert_same_state(again(tmp_path / "empty"), module)
    with pytest.raises(UsageError, match="FineTuneModule: has no adapters"):
        export_adapter(build(FineTuneModule), tmp_path / "a", format="adapterhub")
    export_adapter(module, tmp_path / "a", format="adapterhub")
    with pytest.raises(UsageError, match="prune: the folder decides this"):
        again(tmp_path / "a", prune={"sparsity": 0.5})


def test_folders_that_are_not_foreign_adapters(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ghost: there is no such folder"):
        again(tmp_path / "ghost")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        again(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither PEFT's .peft_type. nor AdapterHub's .config."):
        again(tmp_path)
    export_adapter(pruned(), tmp_path / "ours", format="peft_lightning")
    with pytest.raises(UsageError, match="is an adapter of peft_lightning already; load.. reads it"):
        again(tmp_path / "ours")


@pytest.mark.parametrize("format", ["adapterhub", "peft"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers 2 here 4"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 2 here 1"),
        ({"hidden_size": 64}, "hidden_size 32 here 64"),
        ({"model_type": "roberta"}, "model_type bert here roberta|class BertModel here RobertaModel"),
        ({"model_type": "llama"}, "here llama|class BertModel here LlamaModel"),
    ],
)
def test_another_base_model_is_refused_with_the_difference(
    change: dict[str, Any], message: str, format: str, tmp_path: Path
) -> None:
    export_adapter(pruned("lora"), tmp_path / "out", format=format, head=False)
    config = {**tiny()["config"], **change}
    if config["model_type"] == "llama":
        config = {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    with pytest.raises(CheckpointError, match=f"belongs to another backbone .*({message})"):
        again(tmp_path / "out", backbone={"config": config, "tokenizer": "toy"})


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    export_adapter(pruned(sparsity=0.0), tmp_path / "out", format="adapterhub", head=False)
    path = tmp_path / "out" / "adapter.safetensors"
    state = load_file(path)
    gone = "encoder.layer.0.output.adapters.mine.adapter_up.bias"
    save_file({name: tensor for name, tensor in state.items() if name != gone}, path)
    with pytest.raises(CheckpointError, match=f"missing 1: backbone.{gone}"):
        again(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    config["config"]["mh_adapter"] = False
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(config))
    save_file(state, path)
    with pytest.raises(CheckpointError, match="8 tensors differ .*: encoder.layer.0.attention.output.* no adapter"):
        again(tmp_path / "out")


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    module = pruned()
    export_adapter(module, tmp_path / "out", format="adapterhub")
    path = tmp_path / "out" / "head_config.json"
    config = json.loads(path.read_text())
    labels = config["config"]["label2id"]
    config["config"]["label2id"] = {name: 1 - number for name, number in labels.items()}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the head's classes are in the order"):
        again(tmp_path / "out")


def test_a_bad_backbone_is_named(tmp_path: Path) -> None:
    export_adapter(pruned(), tmp_path / "out", format="adapterhub", head=False)
    with pytest.raises(UsageError, match="backbone.name = .*ghost.*cannot be built"):
        again(tmp_path / "out", backbone=str(tmp_path / "ghost"))
