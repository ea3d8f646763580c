"""Adapters of every format as plain values, with what identifies them; what is refused, and why."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning import FineTuneModule
from peft_lightning.backbones.build import BackboneConfig, build_backbone, fingerprint
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.exchange import ExchangeWarning, export_adapter, import_adapter
from peft_lightning.files.manifest import write_adapter
from peft_lightning.files.sources import read_source, source_names
from peft_lightning.reading.seal import sealed
from tests.sources import backbone_folder, module, written
from tests.toy import build, data, trainer


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return backbone_folder(tmp_path / "backbone")


def bare(backbone: str) -> Any:
    return build_backbone(BackboneConfig(name=backbone))


def adapters_of(given: Any) -> dict[str, torch.Tensor]:
    """The module's own adapter, named as inside the bare backbone."""
    state = given.owned_state().items()
    return {name.removeprefix("backbone."): t for name, t in state if name.startswith("backbone.")}


KINDS = ("houlsby", "pfeiffer", "parallel", "lora")


@pytest.mark.parametrize(
    ("kind", "format"), [("lora", "peft"), *((k, f) for k in KINDS for f in ("adapterhub", "peft_lightning"))]
)
def test_every_format_holds_the_same_adapter(kind: str, format: str, backbone: str, tmp_path: Path) -> None:
    made = module(backbone, 7, kind=kind, scaling=0.5, name="mine", prune={"score": "random"})
    path = written(tmp_path / "out", made, format)
    model = bare(backbone)
    given = read_source(path, backbone=model, fingerprint=fingerprint(model))
    wanted = {name.replace(".mine.", f".{given.adapter.name}."): t for name, t in adapters_of(made).items()}
    tensors = {name: t for name, t in wanted.items() if not name.endswith("_mask")}
    assert given.tensors.keys() == tensors.keys() and given.head is None
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in given.tensors.items())
    assert all(torch.equal(mask, wanted[f"{name}_mask"]) for name, mask in given.masks.items()) and given.masks
    assert (given.adapter.kind, given.adapter.bottleneck, given.adapter.factor) == (kind, 6, 0.5)
    file = path / ("adapter_model.safetensors" if format == "peft" else "adapter.safetensors")
    assert given.origin["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert given.origin["format"] == format and given.origin["has_head"] is (format != "peft")
    if format == "peft_lightning":
        assert (given.origin["seed"], given.origin["task"]) == (7, "toy_sentiment")
        assert given.origin["method"] == "SparseAdapterModule"
        assert given.origin["backbone"] == fingerprint(model)


def test_runs_and_checkpoints(backbone: str, tmp_path: Path) -> None:
    made = module(backbone, 3)
    trainer(tmp_path / "run", max_steps=1).fit(made, datamodule=data(max_length=16))
    run = read_source(tmp_path / "run")
    best = next(path for name in ("best.ckpt", "last.ckpt") if (path := tmp_path / "run" / name).exists())
    for given in (run, read_source(best)):
        assert given.origin["files"] == {best.name: hashlib.sha256(best.read_bytes()).hexdigest()}
        assert given.tensors.keys() == adapters_of(made).keys()
        assert given.base == {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 3}
    last = read_source(tmp_path / "run" / "last.ckpt")
    assert all(torch.equal(tensor, adapters_of(made)[name]) for name, tensor in last.tensors.items())


def test_a_merged_and_tuned_adapter_is_a_source_too(backbone: str, tmp_path: Path) -> None:
    """MerAModule's files hold ``adapter`` among the hyper-parameters, and no ``prune``."""
    made = module(backbone, 1)
    manifest = made.manifest()
    values = {key: value for key, value in manifest["hyper_parameters"].items() if key != "prune"}
    manifest |= {"class": "peft_lightning.methods.mera.MerAModule", "hyper_parameters": values}
    write_adapter(tmp_path / "new", made.owned_state(), manifest)
    with pytest.raises(CheckpointError, match="was saved before its sources were merged"):
        read_source(tmp_path / "new")
    write_adapter(tmp_path / "merged", made.owned_state(), {**manifest, "merged": True})
    given = read_source(tmp_path / "merged")
    assert given.origin["method"] == "MerAModule" and given.tensors.keys() == adapters_of(made).keys()


def test_large_sparse_has_the_bottleneck_of_its_tensors(backbone: str, tmp_path: Path) -> None:
    made = module(backbone, 0, bottleneck=2, prune={"multiplier": 3, "score": "random"})
    given = read_source(written(tmp_path / "out", made, "peft_lightning"))
    assert given.adapter.bottleneck == 6
    assert {t.shape[0] for name, t in given.tensors.items() if name.endswith("down.0.weight")} == {6}


@pytest.mark.parametrize("format", ["adapterhub", "peft_lightning"])
def test_heads_on_request(format: str, backbone: str, tmp_path: Path) -> None:
    made = module(backbone, 0)
    given = read_source(written(tmp_path / "out", made, format), with_head=True)
    assert given.head is not None and given.labels == tuple(made.task.labels)
    state = made.head.state_dict()
    assert given.head.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.head.items())


# -- refusals -------------------------------------------------------------------------------------------------------


def test_other_methods_and_places(backbone: str, tmp_path: Path) -> None:
    whole: Any = build(FineTuneModule, backbone=backbone)
    whole.configure_model()
    write_adapter(tmp_path / "whole", whole.owned_state(), whole.manifest())
    with pytest.raises(CheckpointError, match="was saved by FineTuneModule, which has no adapter to take"):
        read_source(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no best.ckpt, last.ckpt or manifest.json"):
        read_source(tmp_path / "empty")
    (tmp_path / "empty/adapter_fusion_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an AdapterFusion"):
        read_source(tmp_path / "empty")


def edited(path: Path, **changes: Any) -> None:
    """Change a foreign folder's configuration; what AdapterHub has under ``config`` is changed there."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    (config["config"] if "config" in config else config).update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "format", "key"),
    [
        ("pfeiffer", "adapterhub", "phm_layer"),
        ("pfeiffer", "adapterhub", "use_gating"),
        ("lora", "adapterhub", "use_dora"),
        ("lora", "adapterhub", "use_gating"),
        ("lora", "peft", "use_dora"),
    ],
)
def test_what_is_not_computed_here(kind: str, format: str, key: str, backbone: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out", module(backbone, 0, kind=kind), format)
    read_source(path)
    edited(path, **{key: True})
    with pytest.raises(CheckpointError, match=key):
        read_source(path)


def test_rslora_is_refused_and_merges_as_plain_lora(backbone: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out", module(backbone, 0, kind="lora", bottleneck=4, scaling=0.5), "peft")
    edited(path, use_rslora=True)
    with pytest.raises(CheckpointError, match="use_rslora = True.*import it, and export it again as plain LoRA"):
        read_source(path)
    with pytest.warns(ExchangeWarning, match="the head is new"):
        plain = import_adapter(path, task="toy_sentiment", backbone={"name": backbone, "tokenizer": "toy"})
    export_adapter(plain, tmp_path / "plain", format="peft", head=False)
    assert read_source(tmp_path / "plain").adapter.factor == pytest.approx(0.5 * 4 / 4**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers 3 here 2"),
        ({"hidden_size": 32}, "hidden_size 16 here 32"),
        ({"kind": "roberta"}, "model_type bert here roberta"),
    ],
)
@pytest.mark.parametrize("format", ["adapterhub", "peft_lightning"])
def test_other_backbones(format: str, changes: Any, message: str, backbone: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out", module(backbone, 0), format)
    other = bare(backbone_folder(tmp_path / "other", **changes))
    with pytest.raises(CheckpointError, match=f"belongs to another backbone.*{message}"):
        read_source(path, backbone=other, fingerprint=fingerprint(other))


def test_the_same_shape_with_other_weights(backbone: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out", module(backbone, 0), "peft_lightning")
    other = bare(backbone)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="a backbone of the same shape with other weights"):
        read_source(path, backbone=other, fingerprint=fingerprint(other))
    read_source(path, backbone=other)  # facts only


def test_lora_of_a_deeper_model_without_facts(backbone: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out", module(backbone, 0, kind="lora"), "peft")
    edited(path, target_modules="encoder.layer.*query|encoder.layer.*value", auto_mapping=None)
    shallow = bare(backbone_folder(tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"unexpected 2: encoder.layer.2.attention"):
        read_source(path, backbone=shallow)


def test_pickles_and_damage(backbone: str, tmp_path: Path) -> None:
    path = written(tmp_path / "out", module(backbone, 0))
    shutil.copytree(path, tmp_path / "pickled")
    (tmp_path / "pickled/adapter.safetensors").unlink()
    given = read_source(path)
    torch.save(given.tensors, tmp_path / "pickled/pytorch_adapter.bin")
    with pytest.raises(UsageError, match=r"is a pickle, which import and merge read with --allow_bin"):
        read_source(tmp_path / "pickled")
    again = read_source(tmp_path / "pickled", allow_bin=True)
    assert again.tensors.keys() == given.tensors.keys() and list(again.origin["files"]) == ["pytorch_adapter.bin"]
    own = written(tmp_path / "own", module(backbone, 0), "peft_lightning")
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["hyper_parameters"]["adapter"]["bottleneck"] = "six"
    (own / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError, match="damaged .its setting of the adapter"):
        read_source(own)


def test_names_are_short_and_differ() -> None:
    paths = ["hub/imdb/", "runs/a/best.ckpt", "x/imdb", "y/imdb", "z/model.ckpt", "runs/a"]
    assert source_names(paths) == ["imdb", "a", "imdb (2)", "imdb (3)", "model", "a (2)"]
