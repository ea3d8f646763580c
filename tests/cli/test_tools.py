"""``export`` and ``import`` from the command line: what they write, what they say, and how they refuse."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_lightning import SparseAdapterModule, load, load_pruned
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.cli.main import main
from tests.pruned import four_heads, pruned
from tests.toy import build, tiny


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A folder with a small backbone."""
    model: Any = build_backbone(BackboneConfig(**tiny()))
    model.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def ours(backbone: Path, tmp_path: Path) -> Path:
    """An adapter folder of our own, pruned."""
    from peft_lightning.files.manifest import write_adapter

    module: Any = build(
        SparseAdapterModule,
        backbone={"name": str(backbone), "tokenizer": "toy"},
        adapter={"bottleneck": 4, "kind": "lora"},
        prune={"score": "random"},
        task="mrpc",
    )
    module.configure_model()
    for parameter in module.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    module.install_masks(())
    write_adapter(tmp_path / "ours", module.owned_state(), module.manifest())
    return tmp_path / "ours"


def refused(*words: str, status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return the one line that it says."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    captured = capsys.readouterr()
    assert caught.value.code == status, captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("peft-lightning: error: "), captured.err
    return captured.err


@pytest.mark.parametrize("format", ["adapterhub", "peft", "peft_lightning"])
def test_export(format: str, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["export", "--ckpt_path", str(ours), f"--format={format}", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.endswith(f"wrote {out}\n")
    assert ("the head stays behind" in printed) == (format == "peft")
    own = {"adapter.safetensors", "manifest.json"}
    assert own == {path.name for path in out.iterdir()} or (out / "peft_lightning_masks.safetensors").exists()


def test_the_current_folder_and_links(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path / "here")
    export = ["export", "--ckpt_path", str(ours), "--format", "adapterhub", "--out"]
    main([*export, "."])
    main([*export, "../link"])
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert "adapter_config.json" in names and {path.name for path in (tmp_path / "there").iterdir()} == names
    assert Path.cwd() == tmp_path / "here" and (tmp_path / "link").is_symlink()
    assert "out = .: exists already and is not empty" in refused(*export, ".", status=2, capsys=capsys)
    assert "out = ../loop: exists already" in refused(*export, "../loop", status=2, capsys=capsys)
    assert {path.name for path in tmp_path.iterdir()} >= {"here", "there", "link", "loop", "ours"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_our_own_warnings_are_notes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_lightning.exchange import ExchangeWarning

    def export(*args: Any, **options: Any) -> None:
        warnings.warn("from a library, about a line of ours", UserWarning, stacklevel=2)
        warnings.warn("from here", ExchangeWarning, stacklevel=2)

    monkeypatch.setattr("peft_lightning.exchange.export_adapter", export)
    with pytest.warns(UserWarning, match="from a library"):
        main(["export", "--ckpt_path", "x", "--format", "peft", "--out", "y"])
    assert capsys.readouterr().out == "note: from here\nwrote y\n"


def test_import_gives_a_folder_that_load_reads(
    ours: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, back = tmp_path / "hub", tmp_path / "back"
    main(["export", "--ckpt_path", str(ours), "--format", "adapterhub", "--out", str(hub)])
    main(["import", "--from", str(hub), "--task", "mrpc", "--backbone", str(backbone), "--out", str(back)])
    assert "note:" not in capsys.readouterr().out
    one, two = load(ours), load(back)
    for name, tensor in one.owned_state().items():
        assert torch.equal(tensor, two.owned_state()[name])
    main(["export", "--ckpt_path", str(back), "--format", "adapterhub", "--out", str(tmp_path / "again")])
    for file in ("adapter.safetensors", "model_head.safetensors"):
        assert (hub / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    half = tmp_path / "half"
    words = ["import", "--from", str(hub), "--task", "mrpc", "--backbone", str(backbone), "--out", str(half)]
    main([*words, "--dtype", "bfloat16"])
    assert load(half).backbone.dtype == torch.bfloat16


def test_a_new_head_is_said_and_stays_out_of_the_next_export(
    ours: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", "--from", str(tmp_path / "hub"), "--task", "mrpc", "--backbone", str(backbone)]
    main(["export", "--ckpt_path", str(ours), "--format", "adapterhub", "--out", str(tmp_path / "hub")])
    main([*words, "--out", str(tmp_path / "back"), "--new_head", "--tokenizer", "toy"])
    assert "note: " in (printed := capsys.readouterr().out) and "the head is new" in printed
    main(["export", "--ckpt_path", str(tmp_path / "back"), "--format", "adapterhub", "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again" / "model_head.safetensors").exists()
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["model_class"] == "BertModel" and config["model_name"] == "backbone"
    assert all(name.startswith("encoder.") for name in load_file(tmp_path / "again" / "adapter.safetensors"))


def test_pickles_only_on_request(
    ours: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, out = tmp_path / "hub", str(tmp_path / "back")
    main(["export", "--ckpt_path", str(ours), "--format", "adapterhub", "--head", "without", "--out", str(hub)])
    torch.save(load_file(hub / "adapter.safetensors"), hub / "pytorch_adapter.bin")
    (hub / "adapter.safetensors").unlink()
    capsys.readouterr()
    words = ["import", "--from", str(hub), "--task", "mrpc", "--backbone", str(backbone), "--out", out]
    assert "is a pickle, which import and merge read with --allow_bin" in refused(*words, status=2, capsys=capsys)
    main([*words, "--allow_bin"])
    assert load(out).prune.active


def test_refusals_are_one_line_each(
    ours: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", "--ckpt_path", str(ours), "--out", str(tmp_path / "out")]
    for words, status, message in (
        (["export"], 2, "the following arguments are required: --ckpt_path, --format, --out"),
        (["import"], 2, "the following arguments are required: --from, --task, --backbone, --out"),
        ([*export, "--format", "ghost"], 2, "format = 'ghost': must be one of adapterhub, peft, peft_lightning"),
        ([*export, "--format", "onnx"], 2, "format = 'onnx': SparseAdapterModule can be written as adapterhub, peft"),
        ([*export, "--form", "peft"], 2, "required: --format"),
        ([*export, "--format", "peft", "--ghost"], 2, "unrecognized arguments: --ghost"),
        ([*export, "--format", "peft", "--head", "maybe"], 2, "invalid choice: 'maybe'"),
        (["export", "--ckpt_path", "ghost", "--format", "peft", "--out", "x"], 1, "there is no such checkpoint"),
        (["export", "--ckpt_path", str(ours), "--format", "peft", "--out", str(ours)], 2, "is not empty"),
        (
            ["import", "--from", str(ours), "--task", "mrpc", "--backbone", str(backbone), "--out", "x"],
            2,
            "is an adapter of peft_lightning already",
        ),
        (
            ["import", "--from", str(backbone), "--task", "mrpc", "--backbone", str(backbone), "--out", "x"],
            1,
            "holds no adapter_config.json",
        ),
    ):
        assert message in refused(*words, status=status, capsys=capsys)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def pruned_model(tmp_path: Path) -> Path:
    """An adapter folder of our own, of a module that Prune-LoRA trained."""
    from peft_lightning.exchange import export_adapter

    model: Any = build_backbone(BackboneConfig(**four_heads("roberta")))
    model.save_pretrained(tmp_path / "whole")
    export_adapter(pruned(str(tmp_path / "whole")), tmp_path / "pruned", format="peft_lightning")
    return tmp_path / "pruned"


@pytest.mark.parametrize("format", ["transformers", "peft"])
def test_a_pruned_model_is_loaded_again(
    format: str, pruned_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--ckpt_path", str(pruned_model), "--format", format]
    backbone = None if format == "transformers" else tmp_path / "whole"
    for head, kind in (("with", "RobertaForSequenceClassification"), ("without", "RobertaModel")):
        main([*words, "--head", head, "--out", str(tmp_path / head)])
        assert capsys.readouterr().out == f"wrote {tmp_path / head}\n"
        assert type(load_pruned(tmp_path / head, backbone)).__name__ == kind
    main([*words, "--out", str(tmp_path / "auto")])
    assert ("the head stays behind" in capsys.readouterr().out) == (format == "peft")


def test_refusals_of_a_pruned_model_are_one_line_each(
    pruned_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ["export", "--ckpt_path", str(pruned_model), "--out", str(tmp_path / "out"), "--format"]
    for words, message in (
        (["adapterhub"], "format = 'adapterhub': PruneLoRAModule can be written as peft, peft_lightning, transformers"),
        (["onnx", "--head", "without"], "head = False: format = 'onnx' always has the head"),
    ):
        assert message in refused(*export, *words, status=2, capsys=capsys)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    assert "format = 'onnx': needs onnx, not installed here" in refused(*export, "onnx", status=2, capsys=capsys)
    assert not (tmp_path / "out").exists()
    words = ["import", "--from", str(tmp_path / "lora"), "--task", "mrpc", "--backbone", "x", "--out", "y"]
    main([*export[:-2], str(tmp_path / "lora"), "--format", "peft"])
    capsys.readouterr()
    assert "is LoRA for a pruned model" in refused(*words, status=2, capsys=capsys)


@pytest.mark.parametrize("command", ["export", "import"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"peft-lightning {command}" in printed and "--out" in printed
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"  {command}" in capsys.readouterr().out
