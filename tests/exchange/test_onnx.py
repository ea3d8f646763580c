"""ONNX in onnxruntime gives what the module gives, for other batches than the one it was written with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peft_lightning import PruneLoRAModule, load_pruned
from peft_lightning.errors import UsageError
from peft_lightning.exchange import export_adapter
from tests.families import inputs as tokens
from tests.pruned import HEADS, four_heads, pruned

ort: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SOME = ("bert", "deberta-v2", "llama")  # roberta: below
CASES = [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]


def session(folder: Path) -> Any:
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def batches(names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Two shapes, with padding; types where there are any."""
    for rows, length in ((3, 7), (5, 11), (1, 4)):
        batch = tokens(rows, length)
        if "token_type_ids" in names:
            batch["token_type_ids"] = (torch.arange(length) > 2).long().expand(rows, length) * batch["attention_mask"]
        yield batch


def assert_same(m: PruneLoRAModule, folder: Path) -> None:
    run = session(folder)
    names = {entry.name for entry in run.get_inputs()}
    (output,) = run.get_outputs()
    assert (output.name, output.type) == ("logits", "tensor(float)")
    for batch in batches(names):
        assert batch.keys() == names
        (found,) = run.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        with torch.no_grad():
            assert_close(torch.from_numpy(found), m(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_onnxruntime_gives_the_modules_logits(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    m = pruned(four_heads(family))
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    capfd.readouterr()
    export_adapter(m, tmp_path / "out", format="onnx")
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert all(torch.equal(tensor, before[name]) for name, tensor in m.state_dict().items())
    assert_same(m, tmp_path / "out")
    entries = session(tmp_path / "out").get_inputs()
    assert all(entry.shape == ["batch", "tokens"] for entry in entries)
    names = {entry.name for entry in entries}
    assert names - {"token_type_ids"} == {"input_ids", "attention_mask"}
    assert ("token_type_ids" in names) == (family in ("bert", "roberta", "electra"))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"model.onnx", "pruned.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out/pruned.json").read_text())["labels"] == list(m.task.labels)
    with pytest.raises(UsageError, match="holds a model for onnxruntime"):
        load_pruned(tmp_path / "out")


def test_a_layer_without_heads(tmp_path: Path) -> None:
    m = pruned(four_heads("roberta"), heads={1: ()}, head="linear")
    export_adapter(m, tmp_path / "out", format="onnx")
    assert_same(m, tmp_path / "out")


def test_without_the_exporters_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    gone = ("onnx", "onnxscript")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    with pytest.raises(UsageError, match=r"needs onnx and onnxscript, not installed here; pip install 'peft-lightning"):
        export_adapter(pruned(four_heads("bert")), tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_what_the_exporter_cannot_take_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("step 1\nsays more") from ValueError("an operator is missing\nat length")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UsageError, match=r"a bert so pruned cannot be exported \(an operator is missing\)$"):
        export_adapter(pruned(four_heads("bert")), tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
