"""Several processes do what one does, and what ends one of them is said."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning.errors import PeftLightningError, UsageError
from peft_lightning.study import workers
from peft_lightning.study.grid import read_grid
from peft_lightning.study.runner import run_study
from peft_lightning.study.work import Work
from tests.study.helpers import SPARSE, folder, grid_of


class Fatal(Work):
    """Work that ends its process."""

    def run(self, group: Any, tick: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Odd(Work):
    """Work that meets an error of its own."""

    def run(self, group: Any, tick: Any) -> Any:
        raise ValueError("no such thing")


def fatal(*given: Any) -> None:
    """A worker whose work ends it."""
    vars(workers)["Work"] = Fatal
    workers._serve(*given)


def odd(*given: Any) -> None:
    """A worker whose work fails."""
    vars(workers)["Work"] = Odd
    workers._serve(*given)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder(tmp_path_factory.mktemp("study") / "backbone")


def run(values: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_study(read_grid(values), output)


def test_two_workers_do_what_one_process_does(backbone: str, tmp_path: Path) -> None:
    methods = {"good": SPARSE, "wild": {**SPARSE, "lr": [1e30]}}
    grid = grid_of(backbone, methods, epochs=[1], side_by_side=2)
    alone, shared = run(grid, tmp_path / "one"), run({**grid, "workers": 2}, tmp_path / "two")
    assert [record["cell"] for record in alone] == [record["cell"] for record in shared]
    assert [record.get("error") for record in alone] == [record.get("error") for record in shared]
    assert ["error" in record for record in shared].count(False) == 2
    for one, other in zip(alone, shared, strict=True):
        if "error" not in one:
            assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=0, atol=1e-6)
            assert one["predictions"] == other["predictions"]
    assert len([*(tmp_path / "two" / "cells").iterdir()]) == 4


def test_workers_are_as_quiet_as_the_study(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    grid = grid_of(backbone, {"a": SPARSE}, epochs=[1], side_by_side=1, workers=2)
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "level", logging.ERROR)
    run(grid, tmp_path)
    shown = capfd.readouterr().err.splitlines()
    assert [line for line in shown if not line.startswith("cell ")] == []


@pytest.mark.parametrize(
    ("serve", "message"), [(fatal, r"a worker of the study ended with code -9"), (odd, "ValueError: no such thing")]
)
def test_a_worker_that_ends_is_named(
    serve: Any, message: str, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(backbone, {"a": SPARSE}, epochs=[1], side_by_side=1, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_serve", serve)
        with pytest.raises(PeftLightningError, match=message):
            run(grid, tmp_path)
    assert not any("error" in record for record in run({**grid, "workers": 1}, tmp_path))


def test_no_worker_is_no_number() -> None:
    with pytest.raises(UsageError, match=r"study.workers = 0: must be at least 1"):
        read_grid(grid_of("x", {"a": SPARSE}, workers=0))
