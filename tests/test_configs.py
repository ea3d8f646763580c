"""Every YAML under configs/ names its command, holds what belongs there, and trains for two steps."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import peft_lightning
from peft_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
METHODS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
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


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_two_steps(path: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    toy = ["--config", "configs/overlays/toy.yaml"]
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"]
    main([*_command(path), *toy, *HERE, *short, "--run_dir", str(run)])
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert (run / "config.yaml").is_file()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", METHODS, ids=_name)
def test_a_method_says_nothing_about_machines_and_folders(path: Path) -> None:
    content = _load(path)
    assert not MACHINE & set(content.get("trainer", {}))
    assert not {"root", "cache_dir", "workers"} & set(content.get("data", {}).get("init_args", {}))
    assert "run_dir" not in content


@pytest.mark.parametrize("path", [path for path in OVERLAYS if path.stem != "toy"], ids=_name)
def test_an_overlay_says_nothing_about_science(path: Path) -> None:
    content = _load(path)
    assert not {"model", "data", "seed_everything"} & set(content)
    assert not {"max_epochs", "max_steps", "gradient_clip_val"} & set(content.get("trainer", {}))


@pytest.mark.parametrize("path", METHODS, ids=_name)
def test_no_default_is_restated(path: Path) -> None:
    for section in ("model", "data"):
        part = _load(path)[section]
        parameters = inspect.signature(getattr(peft_lightning, part["class_path"])).parameters
        for option, value in part.get("init_args", {}).items():
            for where, given, default in _against(option, value, parameters[option].default):
                assert given != default, f"{_name(path)}: {where} = {given!r} is the default; leave it out"


def _against(where: str, value: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting of a YAML with the default that holds without it."""
    if isinstance(value, dict) and dataclasses.is_dataclass(default):
        for key, entry in value.items():
            yield from _against(f"{where}.{key}", entry, getattr(default, key))
    else:
        yield where, value, default
