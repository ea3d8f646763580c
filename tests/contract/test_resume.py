"""A run that is stopped anywhere and started again ends in the same bits: weights, optimiser, logged metrics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.stopping import StayStopped
from peft_lightning.errors import UsageError
from peft_lightning.files.latest import is_whole
from peft_lightning.module import MethodModule
from peft_lightning.pretrain_module import PretrainModule
from tests.toy import METHODS, build, data, trainer


class Stop(Exception):
    """Stands for a killed process: nothing is saved when it is raised."""


class StopAt(L.Callback):
    """Stops at a micro-batch, counted over epochs, or when a validation begins or ends."""

    def __init__(self, where: str, count: int) -> None:
        self.where, self.count = where, count

    def _tick(self, where: str) -> None:
        if where == self.where:
            self.count -= 1
            if self.count < 0:
                raise Stop

    def on_train_batch_start(self, *args: Any) -> None:
        self._tick("batch start")

    def on_train_batch_end(self, *args: Any) -> None:
        self._tick("batch end")

    def on_validation_start(self, *args: Any) -> None:
        self._tick("validation start")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._tick("validation batch")

    def on_validation_end(self, *args: Any) -> None:
        self._tick("validation end")


def rows(train: int = 75) -> dict[str, Any]:
    from peft_lightning.data.toy import toy_rows

    return {s: toy_rows("toy_sentiment", s, size=n) for s, n in (("train", train), ("validation", 20))}


def run(method: type[MethodModule], folder: Path, stops: list[L.Callback], **options: Any) -> Any:
    """Fit in ``folder`` from its last checkpoint, if there is one."""
    module = build(method)
    last = folder / "last.ckpt"
    fit = trainer(folder, callbacks=stops, **options)
    path = str(last) if last.exists() else None
    # pretraining leaves out what does not fill a batch
    source = data(batch_size=8, rows=rows(80 if issubclass(method, PretrainModule) else 75), method=method)
    fit.fit(module, datamodule=source, ckpt_path=path, weights_only=True)
    return module, fit


def assert_same_end(
    method: type[MethodModule], tmp_path: Path, stops: Sequence[L.Callback], stopped: Any = Stop, **options: Any
) -> None:
    whole, fit = run(method, tmp_path / "whole", [], **options)
    for stop in stops:
        with pytest.raises(stopped):
            run(method, tmp_path / "parts", [stop], **options)
    parts, resumed = run(method, tmp_path / "parts", [], **options)
    assert resumed.global_step == fit.global_step and resumed.current_epoch == fit.current_epoch
    for name, tensor in whole.owned_state().items():
        assert torch.equal(parts.owned_state()[name], tensor), name
    ends = [torch.load(tmp_path / part / "last.ckpt", weights_only=True) for part in ("whole", "parts")]
    torch.testing.assert_close(
        ends[1]["optimizer_states"], ends[0]["optimizer_states"], rtol=0, atol=0, msg="optimiser"
    )
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert ends[0]["callbacks"] == ends[1]["callbacks"]
    logs = [MetricsCSV(tmp_path / part).read() for part in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert sum("train/loss" in row for row in logs[0]) == fit.global_step


# 10 micro-batches an epoch; groups of 3, the last of 1: 4 optimizer steps an epoch.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_epochs": 3},
    "accumulating": {"max_epochs": 3, "accumulate_grad_batches": 3},
    "validating inside the epoch": {"max_epochs": 2, "val_check_interval": 4, "accumulate_grad_batches": 2},
    "validating inside an accumulation": {"max_epochs": 2, "val_check_interval": 3, "accumulate_grad_batches": 2},
    "validating every other epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "by steps": {"max_steps": 23, "max_epochs": -1},
    "validating by steps": {
        **{"max_steps": 11, "max_epochs": -1, "accumulate_grad_batches": 2},
        **{"val_check_interval": 6, "check_val_every_n_epoch": None},
    },
}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_twice(method: type[MethodModule], setting: str, tmp_path: Path) -> None:
    stops: list[L.Callback] = [StopAt("batch start", 7), StopAt("batch end", 6)]
    assert_same_end(method, tmp_path, stops, **SETTINGS[setting])


# Checkpoints of the last step of an epoch, of 10, after which no validation comes.
EPOCH_ENDS: dict[str, dict[str, Any]] = {
    "validating every other epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "validating inside": {"max_epochs": 3, "val_check_interval": 4},
    "accumulating": {"max_epochs": 3, "val_check_interval": 4, "accumulate_grad_batches": 2},
    "fewer": {"max_epochs": 6, "check_val_every_n_epoch": 2, "limit_train_batches": 5},
    "never validating": {"max_epochs": 3, "limit_val_batches": 0},
}


@pytest.mark.parametrize("setting", EPOCH_ENDS)
@pytest.mark.parametrize(
    "counts", [(11, 6), *(pytest.param(c, marks=pytest.mark.slow) for c in product(range(4, 14), range(8)))]
)
def test_stopped_twice_after_the_end_of_an_epoch(setting: str, counts: tuple[int, int], tmp_path: Path) -> None:
    options = {"every_n_steps": 5, **EPOCH_ENDS[setting]}
    assert_same_end(METHODS[0], tmp_path, [StopAt("batch start", count) for count in counts], **options)
    _, again = run(METHODS[0], tmp_path / "parts", [], **options)
    assert again.global_step == torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("where", ["batch start", "batch end"])
@pytest.mark.parametrize("count", range(20))
def test_stopped_at_every_batch(
    method: type[MethodModule], setting: str, where: str, count: int, tmp_path: Path
) -> None:
    assert_same_end(method, tmp_path, [StopAt(where, count)], **SETTINGS[setting])


@pytest.mark.parametrize("where", ["validation start", "validation batch", "validation end"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "by steps"])
def test_stopped_at_a_validation(setting: str, where: str, tmp_path: Path) -> None:
    assert_same_end(METHODS[0], tmp_path, [StopAt(where, 1)], **SETTINGS[setting])


def test_early_stopping_goes_on_too(tmp_path: Path) -> None:
    def patience() -> L.Callback:
        return EarlyStopping("val/loss", patience=2, min_delta=10.0)

    whole, fit = run(METHODS[0], tmp_path / "whole", [patience()], max_epochs=9)
    assert fit.current_epoch == 3
    with pytest.raises(Stop):
        run(METHODS[0], tmp_path / "parts", [patience(), StopAt("validation end", 1)], max_epochs=9)
    for _ in range(2):  # to the end, and once more from there
        parts, resumed = run(METHODS[0], tmp_path / "parts", [patience()], max_epochs=9)
        assert resumed.global_step == fit.global_step
    for name, tensor in whole.owned_state().items():
        assert torch.equal(parts.owned_state()[name], tensor), name


def test_another_batch_size_is_refused(tmp_path: Path) -> None:
    """Also at an epoch's end: Lightning would count the rest of the old epoch in batches of the new size."""
    run(METHODS[0], tmp_path, [], max_epochs=1)
    source = data(batch_size=25, rows=rows())
    with pytest.raises(UsageError, match="allowed to go on with a run: 8, as before"):
        trainer(tmp_path, max_epochs=2).fit(
            build(METHODS[0]), datamodule=source, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
        )


@pytest.mark.parametrize("damaged", [False, True])
def test_a_best_score_counts_only_beside_its_file(
    damaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(METHODS[0], tmp_path / "one", [], max_epochs=1)
    content = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)
    content["callbacks"]["RunCheckpoint"]["best_score"] = 1.0  # nothing beats it
    torch.save(content, tmp_path / "high.ckpt")
    best = tmp_path / "two" / "best.ckpt"
    if damaged:
        best.parent.mkdir()
        best.write_bytes((tmp_path / "one" / "best.ckpt").read_bytes()[:-200])
    fit = trainer(tmp_path / "two", max_epochs=2)
    path = str(tmp_path / "high.ckpt")
    fit.fit(build(METHODS[0]), datamodule=data(batch_size=8, rows=rows()), ckpt_path=path, weights_only=True)
    assert is_whole(best)
    said = f"{best} (step 10) is {'damaged' if damaged else 'gone'}, with val/accuracy 1.0000; the best from here on"
    assert capsys.readouterr().err.count(said) == 1


def test_a_folder_is_not_loaded_as_the_run_that_it_held_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(METHODS[0], tmp_path, [], max_epochs=1)
    held = (tmp_path / "best.ckpt").read_bytes()
    fit = trainer(tmp_path, max_steps=3, max_epochs=-1, limit_val_batches=0)  # no best of its own
    fit.fit(build(METHODS[0]), datamodule=data(batch_size=8, rows=rows()))
    assert not (tmp_path / "best.ckpt").exists() and (tmp_path / "best.earlier.ckpt").read_bytes() == held
    said = f"{tmp_path}/best.ckpt is of an earlier fit: it is best.earlier.ckpt now"
    assert capsys.readouterr().err.count(said) == 1


def test_a_fit_that_a_trainer_goes_on_with_keeps_its_best(tmp_path: Path) -> None:
    module, fit = run(METHODS[0], tmp_path, [], max_epochs=1)
    assert fit.global_step > 0
    fit.fit_loop.max_epochs = 2
    fit.fit(module, datamodule=data(batch_size=8, rows=rows()))
    assert (tmp_path / "best.ckpt").exists() and not (tmp_path / "best.earlier.ckpt").exists()


def test_a_run_that_something_else_has_stopped_goes_on(tmp_path: Path) -> None:
    """Such as a limit of time: only what early stopping has stopped stays so."""

    class Over(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    def callbacks() -> list[L.Callback]:
        return [EarlyStopping("val/loss", patience=9, check_on_train_epoch_end=False), StayStopped()]

    _, stopped = run(METHODS[0], tmp_path, [*callbacks(), Over()], max_epochs=2)
    assert stopped.global_step == 3
    _, goes_on = run(METHODS[0], tmp_path, callbacks(), max_epochs=2)
    assert goes_on.global_step == 20
