"""``pruned.json``: written and read again, and damaged in every way that would be noticed late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_lightning.backbones.options import PRUNED_FILE
from peft_lightning.errors import CheckpointError
from peft_lightning.files.pruned import PrunedRecord, check_digests, read_pruned, write_pruned
from peft_lightning.layers.plan import PrunePlan

PLAN = PrunePlan(
    heads={"layer.0.attention": (0, 2), "layer.1.attention": ()},
    neurons={"layer.0": (1, 5)},
    ranks={"layer.0": 8, "layer.1": 4},
    units={"layer.0.attention": 3, "layer.1.attention": 3},
    inner={"layer.0": 9},
)
RECORD = PrunedRecord(
    kind="model",
    model_class="BertModel",
    plan=PLAN,
    outputs=2,
    labels=("no", "yes"),
    backbone={"model_type": "bert", "weights": "abc"},
    source={"name": "tiny", "folder": True, "config": None, "revision": None, "dtype": "float32", "seed": 1},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"tensors")
    (tmp_path / "config.json").write_bytes(b"{}")
    write_pruned(tmp_path, RECORD, ["model.safetensors", "config.json"])
    return tmp_path


def test_written_and_read_again(folder: Path) -> None:
    record = read_pruned(folder)
    assert record.plan == PLAN and record.sha256.keys() == {"model.safetensors", "config.json"}
    names = ("kind", "model_class", "outputs", "labels", "backbone", "source")
    assert all(getattr(record, name) == getattr(RECORD, name) for name in names)
    check_digests(folder, record)


def test_files_beside_it(folder: Path) -> None:
    record = read_pruned(folder)
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="model.safetensors: damaged or replaced .its SHA-256 is not that of pru"):
        check_digests(folder, record)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors: missing or not readable"):
        check_digests(folder, record)


def test_folders_without_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ghost: there is no such folder"):
        read_pruned(tmp_path / "ghost")
    with pytest.raises(CheckpointError, match="holds no pruned.json, as export writes it for a pruned model"):
        read_pruned(tmp_path)
    for text in ("{", "[]", "[" * 5000):
        (tmp_path / PRUNED_FILE).write_text(text)
        with pytest.raises(CheckpointError, match="pruned.json: (missing or damaged|holds no mapping)"):
            read_pruned(tmp_path)


DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({"format": 9}, "format 9 is not the format 1 that is read here"),
    ({"kind": "ghost"}, "kind = ghost: must be one of model, adapter, onnx"),
    ({"kind": []}, "kind = .*: must be one of model"),
    ({"model_class": None}, "model_class must be of type str"),
    ({"outputs": True}, "outputs must be of type int"),
    ({"outputs": 10**12}, "outputs must be from 1 to 1000000"),
    ({"labels": "no"}, "labels must be of type list"),
    ({"backbone": 3}, "backbone must be of type dict"),
    ({"backbone": {}}, "it does not say which backbone it belongs to"),
    ({"source": []}, "source must be of type dict"),
    ({"source": {"name": "tiny"}}, "source must say name, folder, config, revision, dtype, seed"),
    ({"source": {**RECORD.source, "seed": None}}, "source must say name, folder"),
    ({"sha256": {}}, "it has no digest of model.safetensors"),
    ({"sha256": {"model.safetensors": 3}}, "sha256 must give each file's digest"),
    ({"sha256": {"../model.safetensors": "x"}}, "sha256 must give each file's digest"),
    ({"sha256": ["model.safetensors"]}, "sha256 must give each file's digest"),
    ({"plan": None}, "it does not say which heads were kept"),
    ({"plan": {**PLAN.plain(), "heads": {"layer.0.attention": [-1]}}}, "heads .*in its plan is malformed"),
    ({"plan": {**PLAN.plain(), "ranks": {"layer.0": "8"}}}, "ranks .*in its plan is malformed"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGES, ids=str)
def test_damages(changes: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / PRUNED_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"pruned.json: .*{message}"):
        read_pruned(folder)


def test_another_plan_is_a_damage_too(folder: Path) -> None:
    content = json.loads((folder / PRUNED_FILE).read_text())
    content["outputs"] = 3
    (folder / PRUNED_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"pruned.json: damaged .it was changed after it was written"):
        read_pruned(folder)
    content.pop("sha256_of_this")  # of an earlier version
    (folder / PRUNED_FILE).write_text(json.dumps(content))
    assert read_pruned(folder).outputs == 3


def test_a_link_that_leads_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
        check_digests(folder, read_pruned(folder))
