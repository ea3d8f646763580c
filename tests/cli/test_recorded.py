"""A backbone's name and its configuration as two flags: the parser would refuse the first before it sees the second."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from peft_lightning import BackboneConfig
from peft_lightning.cli.main import main
from peft_lightning.cli.recorded import joined

ROOT = Path(__file__).resolve().parents[2]
BART = "{model_type: bart, d_model: 32, init_std: 1e-1}"


def test_words_are_joined_where_one_of_them_is_null() -> None:
    words = ["fit", "--model.backbone.name", "null", "--x", "1", "--model.init_args.backbone.config={a: 1e-3}", "--y"]
    assert joined(words) == ["fit", "--x", "1", "--model.backbone={name: null, config: {a: 1e-3}}", "--y"]
    words = ["--model.backbone.config=null", "--model.backbone.name", "a: {b,c"]
    assert joined(words) == ['--model.backbone={config: null, name: "a: {b,c"}']


@pytest.mark.parametrize(
    "words",
    [
        "fit --config x",
        "--model.backbone.name a",
        "--model.backbone.config null",
        "--model.backbone.name a --model.backbone.config {b:1}",
        "--model.backbone.name null --model.backbone.config file.yaml",
        "--x 1 --model.backbone.name",
    ],
)
def test_other_words_stay(words: str) -> None:
    assert joined(words.split()) == words.split()


@pytest.mark.parametrize("words", [["--model.backbone", "a b"], ["--model.init_args.backbone=a b"]])
def test_a_name_stays_where_options_inside_of_the_backbone_follow(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert joined([*words, "--x"]) == [*words, "--x"]
    assert joined(["--model.backbone.dtype", "bfloat16", *words]) == ["--model.backbone.dtype", "bfloat16", *words]
    monkeypatch.setattr("sys.argv", ["peft-lightning"])
    inside = ["--model.backbone.tokenizer", "toy", "--model.init_args.backbone.dtype=bfloat16"]
    configs = [
        "--config",
        str(ROOT / "configs/sparse_adapter.yaml"),
        "--config",
        str(ROOT / "configs/overlays/toy.yaml"),
    ]
    with pytest.raises(SystemExit) as end:
        main(["fit", *configs, *words, *inside, "--print_config"])
    assert not end.value.code
    backbone = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert backbone == asdict(BackboneConfig(name="a b", tokenizer="toy", dtype="bfloat16"))


@pytest.mark.parametrize("turned", [False, True])
def test_a_random_backbone_by_flags_instead_of_a_named_one(
    turned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])
    flags = [["--model.backbone.name", "null"], ["--model.backbone.config", BART], ["--model.backbone.tokenizer=toy"]]
    words = [word for flag in (flags[::-1] if turned else flags) for word in flag]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(ROOT / "configs/prune_lora_tuned.yaml"), *words, "--print_config"])
    assert not end.value.code
    backbone = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["backbone"]
    assert backbone["name"] is None and backbone["tokenizer"] == "toy"
    assert backbone["config"] == {"model_type": "bart", "d_model": 32, "init_std": 0.1}
    assert backbone["dtype"] == "bfloat16"  # the rest is as the file says
