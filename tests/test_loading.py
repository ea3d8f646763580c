"""From a file to answers, and what a file may not do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning import FineTuneModule, SparseAdapterModule, load
from peft_lightning.errors import CheckpointError, DataError, UsageError
from peft_lightning.files.manifest import MANIFEST_KEY
from tests.contract.kinds import TOYS, data_of, rows_of, writer
from tests.toy import build, data, tiny, trainer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    module = build(SparseAdapterModule, task="toy_pairs")
    trainer(folder, max_steps=2).fit(module, datamodule=data(task="toy_pairs"))
    return folder / "last.ckpt"


def test_predict_takes_pairs_rows_and_any_batch_size(file: Path) -> None:
    module = load(file)
    pairs = [("the cat runs", "this dog sleeps"), ("that fish eats", "the fish plays now and then")] * 3
    rows = [{"sentence1": a, "sentence2": b, "ghost": 1} for a, b in pairs]
    answers = module.predict(pairs)
    assert module.predict(rows) == answers
    for one, other in zip(module.predict(pairs, batch_size=1), answers, strict=True):
        assert one["label"] == other["label"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert module.predict([]) == []


@pytest.mark.parametrize("texts", ["one string", ["one text"], [("a", "b", "c")], [{"sentence1": "a"}], [3]])
def test_predict_refuses_what_is_not_a_pair(file: Path, texts: Any) -> None:
    with pytest.raises(UsageError, match="texts"):
        load(file).predict(texts)
    with pytest.raises(DataError, match=r"row 0, column 'sentence1': 1 is not a text"):
        load(file).predict([(1, 2)])


def test_another_backbone_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointError, match="another backbone.*hidden_size"):
        load(file, backbone={**tiny(), "config": {**tiny()["config"], "hidden_size": 64}})
    other = {**tiny(), "config": {**tiny()["config"], "initializer_range": 0.1}}
    with pytest.raises(CheckpointError, match="same shape with other weights"):
        load(file, backbone=other)


def test_a_file_does_not_choose_what_is_imported(file: Path, tmp_path: Path) -> None:
    content = torch.load(file, weights_only=True)
    content[MANIFEST_KEY]["hyper_parameters"]["task"]["kind"] = "antigravity.Kind"
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="the class .antigravity.Kind.; import antigravity first"):
        load(tmp_path / "evil.ckpt")


@pytest.mark.parametrize(
    ("kind", "package", "message"),
    [
        ("tags", "seqeval", "package seqeval, which is not installed"),
        ("generate", "rouge_score", "package rouge-score"),
    ],
)
def test_a_missing_package_is_named(
    kind: str, package: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = writer(0.1) if kind == "generate" else tiny()
    module = build(FineTuneModule, task=TOYS[kind].task, backbone=backbone)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=data_of(kind, rows_of(kind, {"train": 8, "validation": 8})))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError, match=f"last.ckpt: .*{message}") as caught:
        load(tmp_path / "last.ckpt")
    assert "hyper-parameters" not in str(caught.value)
