"""Every YAML under configs/ names its command, holds what belongs there, and trains for two steps."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import get_loader

import peft_lightning
from peft_lightning.cli.main import main
from peft_lightning.data.toy import toy_rows
from peft_lightning.study.cells import cells_of
from peft_lightning.study.grid import read_grid
from peft_lightning.study.results import majorities, read_study
from peft_lightning.study.selection import choose
from tests.toy import toy_sources

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))
METHODS = sorted((ROOT / "configs").glob("*.yaml"))
# What these pretrain on here; a method that is tuned uses the toy task instead.
SMALL = [
    "--config",
    "configs/overlays/pretrain_cpu.yaml",
    "--data.vocab_size",
    "300",
    "--model.backbone.compile",
    "false",
]
# What a configuration trains here instead of the toy overlay's task.
TOYS = {
    "sparse_adapter_squad": ["--data.task", "toy_span"],
    "sparse_adapter_xsum": [
        "--data.task=toy_copy",
        "--model.backbone.config="
        "{model_type: bart, d_model: 32, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
        "decoder_attention_heads: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32}",
    ],
}
# These start from adapters; here from random ones on the toy overlay's backbone.
SOURCED = ("fusion", "mera")
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
# Overlays with a model and a task of their own.
OWN = [ROOT / "configs" / "overlays" / f"{name}.yaml" for name in ("toy", "toy_bart", "pretrain_cpu")]
MACHINE = {"accelerator", "devices", "num_nodes", "strategy", "precision", "plugins", "benchmark"}
# A machine's overlay says how a GPU or several processes are used; two steps of it must run on any machine.
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _command(path: Path) -> list[str]:
    """Return the words of the command in a YAML's first line."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# peft-lightning "), f"{_name(path)}: the first line is not its command"
    return shlex.split(first.removeprefix("# peft-lightning "))


def _load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_the_first_line_is_a_command_that_uses_the_file(path: Path) -> None:
    words = _command(path)
    files = [words[place + 1] for place, word in enumerate(words) if word == "--config"]
    assert _name(path) in files
    assert not [file for file in files if not (ROOT / file).is_file()]


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in STUDIES], ids=_name)
def test_two_steps(path: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    words = _command(path)
    if _pretrains(words):
        (tmp_path / "text.txt").write_text("\n\n".join(toy_texts()), encoding="utf-8")
        toy = [*SMALL, "--data.inputs", str(tmp_path / "text.txt"), "--trainer.val_check_interval=2"]
    else:
        toy = ["--config", "configs/overlays/toy.yaml", *TOYS.get(path.stem, [])] if path not in OWN else []
        toy += [f"--model.sources=[{', '.join(toy_adapters())}]"] if path.stem in SOURCED else []
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"]
    main([*words, *toy, *HERE, *short, "--run_dir", str(run)])
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert (run / "config.yaml").is_file()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", STUDIES, ids=_name)
def test_a_study_s_cells_can_be_made(path: Path) -> None:
    words = _command(path)
    assert words[0] == "study" and words[words.index("--output") + 1].startswith("runs/")
    cells = cells_of(read_grid(get_loader("yaml")(path.read_text())))
    assert len(cells) > 1
    for name in {(cell.method, cell.variant, cell.task) for cell in cells}:
        next(cell for cell in cells if (cell.method, cell.variant, cell.task) == name).module()


def test_the_toy_study_learns(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = _command(ROOT / "configs" / "study" / "toy.yaml")
    words[words.index("--output") + 1] = str(tmp_path)
    main([*words, "--device", "cpu"])
    records = choose(read_study(tmp_path))
    names = ("untrained", "adapter", "sparse adapter")
    accuracy = {name: [r["test"]["accuracy"] for r in records if r["cell"]["method"] == name] for name in names}
    assert [len(values) for values in accuracy.values()] == [3, 3, 3]
    means = [sum(values) / 3 for values in accuracy.values()]
    majority = majorities(tmp_path)["toy_sentiment"]["accuracy"]
    assert means[0] < majority + 0.05 and means[1] > majority + 0.1


def test_the_toy_bart_learns_to_copy(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = _command(ROOT / "configs" / "overlays" / "toy_bart.yaml")
    short = ["--trainer.max_epochs=4", "--trainer.enable_progress_bar=false"]
    main([*words, *HERE, *short, "--run_dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "report.json").read_text())["scores"]["rougeL"] > 0.9


def toy_adapters() -> list[str]:
    """Folders of two adapters on the toy overlay's backbone."""
    backbone = _load(ROOT / "configs" / "overlays" / "toy.yaml")["model"]["init_args"]["backbone"]
    return toy_sources({key: value for key, value in backbone.items() if value is not None})


def toy_texts() -> list[str]:
    """Texts of the toy language, some hundred blocks of them."""
    return [row["text"] for row in toy_rows("toy_sentiment", "train")] * 4


def _pretrains(words: list[str]) -> bool:
    files = [ROOT / words[place + 1] for place, word in enumerate(words) if word == "--config"]
    return any(_load(file).get("data", {}).get("class_path") == "MLMDataModule" for file in files)


@pytest.mark.parametrize("path", [path for path in OVERLAYS if path.stem.startswith("pretrain_")], ids=_name)
def test_every_machine_trains_on_batches_of_one_size(path: Path) -> None:
    """The paper's 1,024 blocks a step and 2,500 steps between validations, however many devices there are."""
    if path.stem == "pretrain_cpu":  # a model of its own
        return
    settings = {**_flat(_load(ROOT / "configs" / "sctd_pretrain.yaml")), **_flat(_load(path))}
    blocks = settings.get("data.init_args.batch_size", 32) * settings["trainer.accumulate_grad_batches"]
    blocks *= settings.get("trainer.devices", 1) * settings.get("trainer.num_nodes", 1)
    assert blocks == 1024
    assert settings["trainer.val_check_interval"] == 2500 * settings["trainer.accumulate_grad_batches"]


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {k: v for key, part in content.items() for k, v in _flat(part, f"{prefix}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize("path", METHODS, ids=_name)
def test_a_method_says_nothing_about_machines_and_folders(path: Path) -> None:
    content = _load(path)
    assert not MACHINE & set(content.get("trainer", {}))
    assert not {"root", "cache_dir", "workers"} & set(content.get("data", {}).get("init_args", {}))
    assert "run_dir" not in content


# How a machine computes and loads is in the model's and the data's section.
MACHINES_OWN = {"model.init_args.backbone.compile", "data.init_args.batch_size", "data.init_args.workers"}


@pytest.mark.parametrize("path", [p for p in OVERLAYS if p not in OWN], ids=_name)
def test_an_overlay_says_nothing_about_science(path: Path) -> None:
    content = _load(path)
    sections = {key: part for key, part in content.items() if key in ("model", "data", "seed_everything")}
    assert not set(_flat(sections) if sections else ()) - MACHINES_OWN
    assert not {"max_epochs", "max_steps", "gradient_clip_val"} & set(content.get("trainer", {}))


@pytest.mark.parametrize("path", METHODS, ids=_name)
def test_no_default_is_restated(path: Path) -> None:
    for section in ("model", "data"):
        part = _load(path)[section]
        parameters = _parameters(getattr(peft_lightning, part["class_path"]))
        for option, value in part.get("init_args", {}).items():
            for where, given, default in _against(option, value, parameters[option].default):
                assert given != default, f"{_name(path)}: {where} = {given!r} is the default; leave it out"


def _parameters(kind: type[Any]) -> dict[str, inspect.Parameter]:
    """What a class takes, also what it hands on to the one that it is derived from."""
    own = dict(inspect.signature(kind).parameters)
    return {**(_parameters(kind.__base__) if "options" in own and kind.__base__ else {}), **own}


def _against(where: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting of a YAML with the default that holds without it."""
    if isinstance(value, dict) and dataclasses.is_dataclass(default):
        for key, entry in value.items():
            yield from _against(f"{where}.{key}", entry, getattr(default, key))
    else:
        yield where, value, default
