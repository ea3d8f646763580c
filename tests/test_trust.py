"""A path in a file decides neither what is imported nor what kind of thing is made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

import peft_lightning.trust
from peft_lightning.errors import UsageError
from peft_lightning.trust import find_class, trust, trusted


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder that leaves a file behind when it is imported."""
    (tmp_path / "a_module_to_trust.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "(Path(__file__).parent / 'imported').touch()\n"
        "class Mine(Callback):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(peft_lightning.trust, "_named", [])
    monkeypatch.delitem(sys.modules, "a_module_to_trust", raising=False)
    return "a_module_to_trust"


def test_classes_of_trusted_packages(own_module: str) -> None:
    assert find_class("lightning.pytorch.callbacks.EarlyStopping", Callback, "x").__name__ == "EarlyStopping"
    with pytest.raises(UsageError, match=r"x = 'a_module_to_trust.Mine': is of none of the packages peft_lightning"):
        find_class("a_module_to_trust.Mine", Callback, "x")
    assert not Path("imported").exists()
    trust([own_module])
    assert Path("imported").exists() and trusted()[-1] == own_module
    assert find_class("a_module_to_trust.Mine", Callback, "x").__name__ == "Mine"


@pytest.mark.parametrize("path", ["os.system", "torch.hub.load", "lightning.Trainer", "torch.ghost", "sys.modules"])
def test_what_is_no_subclass(path: str) -> None:
    with pytest.raises(UsageError, match=f"x = '{path}': must be a subclass of lightning.pytorch.callbacks.callback.C"):
        find_class(path, Callback, "x")


@pytest.mark.parametrize("path", ["this.X", "antigravity.X", "torchx.X", "no_such.module.X", "", ".", "x", "a b.c"])
def test_what_is_not_imported(path: str) -> None:
    before = set(sys.modules)
    with pytest.raises(UsageError, match="is of none of the packages"):
        find_class(path, Callback, "x")
    assert set(sys.modules) == before


def test_a_module_that_cannot_be_imported(own_module: str) -> None:
    with pytest.raises(UsageError, match="--import = 'no_such_module': cannot be imported .ModuleNotFoundError"):
        trust(["no_such_module"])
    with pytest.raises(UsageError, match="--import = 'a/b.py': must be a module's name"):
        trust(["a/b.py"])
    Path("broken_module.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match="--import = 'broken_module': cannot be imported .ZeroDivisionError"):
        trust(["broken_module"])


def test_a_kind_and_a_grid_s_method() -> None:
    from peft_lightning.study.grid import MethodGrid
    from peft_lightning.tasks.kinds.base import build_kind
    from peft_lightning.tasks.table import Task

    made: list[Any] = [lambda: build_kind(Task(kind="this.X")), lambda: MethodGrid(class_path="this.X")]
    for make in made:
        with pytest.raises(UsageError, match="'this.X': is of none of the packages"):
            make()
    assert "this" not in sys.modules
    with pytest.raises(UsageError, match="class_path = 'os.system': must be a subclass of .*TaskModule"):
        MethodGrid(class_path="os.system")
    with pytest.raises(UsageError, match="class_path = 'Ghost': must be FineTuneModule"):
        MethodGrid(class_path="Ghost")
