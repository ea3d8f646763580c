"""A backbone's name and its configuration as two flags: the parser would refuse the first before it sees the second."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_lightning import BackboneConfig
from peft_lightning.cli.main import main
from peft_lightning.cli.recorded import joined
from peft_lightning.cli.trainer import TrainerCLI

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


def test_words_that_look_like_truth_values_stay_words(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser would make a truth value of a quoted text inside a task's options when it writes the file."""
    monkeypatch.setattr("sys.argv", ["peft-lightning"])
    options = {"template": "{0} {mask} {1}", "words": {"different": "No", "same": "true"}, "sets": 3}
    task = {"name": "toy_pairs", "kind": "prompt", "text": ["text_a", "text_b"], "labels": ["different", "same"]}
    values = {"data": {"init_args": {"task": {**task, "options": options}}}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(values))
    names = ("configs/few_shot.yaml", "configs/overlays/toy.yaml", "configs/overlays/cpu.yaml")
    configs = [word for name in names for word in ("--config", str(ROOT / name))]
    effective: list[Any] = []

    def stop(cli: Any) -> None:
        effective.append(cli._effective())
        raise SystemExit

    monkeypatch.setattr(TrainerCLI, "instantiate_trainer", stop)
    with pytest.raises(SystemExit):
        main(["fit", *configs, "--config", str(tmp_path / "task.yaml"), "--run_dir", str(tmp_path / "run")])
    assert effective[0]["data"]["init_args"]["task"]["options"] == options


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
