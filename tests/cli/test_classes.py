"""A configuration names classes of the expected kind, of packages that are trusted; nothing else is imported or run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import peft_lightning.trust
from peft_lightning.cli.main import main
from tests.cli.test_bad_input import FIT, fails


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["peft-lightning"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(peft_lightning.trust, "_named", [])
    monkeypatch.setenv("PEFT_LIGHTNING_IMPORT", "")
    monkeypatch.chdir(tmp_path)


def configured(content: dict[str, Any]) -> list[str]:
    Path("evil.yaml").write_text(yaml.safe_dump(content))
    return [*FIT, "--config", "evil.yaml", "--run_dir", "run", "--trainer.enable_progress_bar=false"]


RUN = {"class_path": "torch.utils.collect_env.run", "init_args": {"command": "touch ran"}}
TORCHRUN = {
    "class_path": "torch.distributed.run.main",
    "init_args": {"args": ["--no-python", "--standalone", "touch", "ran"]},
}


def averaging(function: Any) -> dict[str, Any]:
    """A callback with an option that takes anything that can be called."""
    name = "lightning.pytorch.callbacks.StochasticWeightAveraging"
    return {
        "trainer": {
            "callbacks": [{"class_path": name, "init_args": {"swa_lrs": 0.1, "swa_epoch_start": 1, "avg_fn": function}}]
        }
    }


EVIL: dict[str, dict[str, Any]] = {
    "model": {"model": {"class_path": "os.system", "init_args": {"command": "touch ran"}}},
    "data": {"data": {"class_path": "subprocess.Popen", "init_args": {"args": "touch ran"}}},
    "model not imported yet": {"model": {"class_path": "this.X"}},
    "callback": {"trainer": {"callbacks": [{"class_path": "os.system"}]}},
    "callback not imported yet": {"trainer": {"callbacks": [{"class_path": "this.X"}]}},
    "logger": {"trainer": {"logger": {"class_path": "this.X"}}},
    "logger of a module inside": {"trainer": {"logger": {"class_path": "torch.hub.os.system"}}},
    "strategy": {"trainer": {"strategy": {"class_path": "os.system"}}},
    "plugins": {"trainer": {"plugins": [{"class_path": "this.X"}]}},
    "profiler": {"trainer": {"profiler": {"class_path": "this.X"}}},
    "a function": {"trainer": {"callbacks": [RUN]}},
    "a function inside a callback": {
        "trainer": {"callbacks": [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": RUN}}]}
    },
    "a function that a callback calls": averaging("torch.distributed.run.main"),
    "a function whose result a callback calls": averaging(TORCHRUN),
    "a class that a callback calls": averaging({"class_path": "torch.nn.Linear", "init_args": {}}),
    "a hook of a strategy": {
        "trainer": {
            "strategy": {
                "class_path": "lightning.pytorch.strategies.DDPStrategy",
                "init_args": {"ddp_comm_hook": TORCHRUN},
            }
        }
    },
    "another class": {"trainer": {"callbacks": [{"class_path": "torch.nn.Linear", "init_args": {}}]}},
    "a kind": {
        "data": {"init_args": {"task": {"name": "mine", "kind": "this.X", "text": ["text"], "labels": ["a", "b"]}}}
    },
    "a setting of any type": {"data": {"init_args": {"task": RUN}}},
    "a backbone": {"model": {"init_args": {"backbone": {"name": None, "config": RUN}}}},
}


@pytest.mark.parametrize("case", EVIL)
def test_a_configuration_that_names_something_else(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(configured(EVIL[case]), capsys)
    assert status == 2, line
    assert "this" not in sys.modules
    assert not Path("ran").exists() and not Path("run/last.ckpt").exists()
    if "this.X" in str(EVIL[case]):
        assert "this.X" in line and "--import this trusts its module" in line


@pytest.mark.parametrize("where", ["model.init_args.backbone", "trainer.logger", "checkpoint"])
def test_what_is_refused_is_not_imported(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the parser takes any value, and where no user has written it."""
    Path("evil_module.py").write_text("open('ran', 'w').close()\nclass Evil:\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    evil = {"class_path": "evil_module.Evil"}
    backbone = {"config": {"model_type": "bert", **evil}, "tokenizer": "toy"}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}, "dict_kwargs": {"a": evil}}
    words = configured({"trainer": {"logger": logger}})
    if where == "model.init_args.backbone":
        words = configured({"model": {"init_args": {"backbone": backbone}}})
    elif where == "checkpoint":
        main([*configured({}), "--trainer.max_steps", "1", "--trainer.val_check_interval", "1"])
        content = torch.load("run/last.ckpt", weights_only=True)
        content["peft_lightning"]["hyper_parameters"]["backbone"]["config"].update(evil)
        torch.save(content, "evil.ckpt")
        words = ["test", "--ckpt_path", "evil.ckpt"]
    fails(words, capsys)
    assert not Path("ran").exists() and "evil_module" not in sys.modules


def test_a_module_that_the_user_names(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_callbacks_for_a_test.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Mark(Callback):\n"
        "    def on_fit_start(self, trainer, pl_module) -> None:\n"
        "        open('marked', 'w').close()\n"
    )
    words = configured({"trainer": {"callbacks": [{"class_path": "my_callbacks_for_a_test.Mark"}]}})
    status, line = fails(words, capsys)
    assert status == 2 and "--import my_callbacks_for_a_test trusts its module" in line
    assert not Path("marked").exists()
    main([*words, "--import", "my_callbacks_for_a_test"])
    assert Path("marked").exists() and Path("run/last.ckpt").exists()
    status, line = fails([*words, "--import=no_such_module"], capsys)
    assert status == 2 and "--import = 'no_such_module': cannot be imported" in line


def test_a_function_of_a_module_that_the_user_names(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_average_for_a_test.py").write_text(
        "from torch import Tensor\ndef average(old: Tensor, new: Tensor, count: Tensor) -> Tensor:\n    return new\n"
    )
    words = configured(averaging("my_average_for_a_test.average"))
    assert fails(words, capsys)[0] == 2
    main([*words, "--import", "my_average_for_a_test"])
    assert Path("run/last.ckpt").exists()


def test_a_grid_names_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"backbone": "x", "tasks": ["toy_sentiment"], "methods": {"a": {"class_path": "this.X"}}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    status, line = fails(["study", "--config", "grid.yaml", "--output", "out"], capsys)
    assert status == 2 and "'this.X': is of none of the packages" in line and "this" not in sys.modules
