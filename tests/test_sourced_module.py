"""Folders of sources that are gone: a file makes them needless, whichever way Lightning reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from peft_lightning import FusionModule, MerAModule, load
from peft_lightning.errors import CheckpointError
from tests.toy import build, data, tiny, toy_sources, trainer

BOTH = pytest.mark.parametrize("method", [MerAModule, FusionModule])
Built = tuple[Callable[[], Any], str]


@pytest.fixture
def gone(method: Any, tmp_path: Path) -> Built:
    """Builds a module whose sources are gone, and the checkpoint that was made while they were there."""
    paths = [str(shutil.copytree(path, tmp_path / f"s{n}")) for n, path in enumerate(toy_sources(tiny(0.0), keep=0.5))]

    def fresh() -> Any:
        return build(method, backbone=tiny(0.0), dropout=0.0, sources=paths)

    trainer(tmp_path / "run", max_steps=3).fit(fresh(), datamodule=data())
    for path in paths:
        shutil.rmtree(path)
    return fresh, str(tmp_path / "run" / "last.ckpt")


@BOTH
def test_load_from_checkpoint(method: Any, gone: Built) -> None:
    fresh, last = gone
    found, expected = method.load_from_checkpoint(last, weights_only=True), load(last)
    assert_close(found.owned_state(), expected.owned_state(), rtol=0, atol=0)
    assert found.summary() == expected.summary() and found.predict(["good"]) == expected.predict(["good"])
    with pytest.raises(CheckpointError, match="s0: there is no such checkpoint"):
        fresh().configure_model()  # by hand no file comes


@BOTH
@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_evaluation_of_a_file(method: Any, what: str, gone: Built) -> None:
    fresh, last = gone
    module = fresh()
    getattr(trainer(), what)(module, datamodule=data(), ckpt_path=last, weights_only=True)
    assert_close(module.owned_state(), load(last).owned_state(), rtol=0, atol=0)


@BOTH
def test_a_fit_goes_on(method: Any, gone: Built, tmp_path: Path) -> None:
    fresh, last = gone
    ends = []
    for module in (fresh(), load(last)):
        trainer(max_steps=6).fit(module, datamodule=data(), ckpt_path=last, weights_only=True)
        ends.append(module.owned_state())
    assert_close(ends[0], ends[1], rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("what", ["fit", "validate", "test", "predict"])
def test_without_a_file_it_does_not_start(method: Any, what: str, gone: Built) -> None:
    fresh, _ = gone
    with pytest.raises(CheckpointError, match="s0: there is no such folder or checkpoint"):
        getattr(trainer(max_steps=1), what)(fresh(), datamodule=data())
