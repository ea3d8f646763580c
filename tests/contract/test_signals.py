"""SIGTERM, SLURM's SIGUSR1 and Ctrl-C save and end the process wherever they come, and the run goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.files.latest import is_whole
from peft_lightning.module import MethodModule
from peft_lightning.stopping import Terminated
from tests.contract.test_resume import SETTINGS, StopAt, assert_same_end, run
from tests.toy import METHODS

EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


class SignalAt(StopAt):
    """Sends this process a signal at a micro-batch, or where a validation begins, goes on or ends."""

    def __init__(self, where: str, count: int, number: int = signal.SIGTERM) -> None:
        super().__init__(where, count)
        self.number = number

    def _tick(self, where: str) -> None:
        if where == self.where:
            self.count -= 1
            if self.count == -1:
                os.kill(os.getpid(), self.number)


@EVERY
def test_signalled_and_gone_on(method: type[MethodModule], tmp_path: Path) -> None:
    stops = [SignalAt("batch start", 7), SignalAt("validation batch", 1, signal.SIGUSR1)]
    assert_same_end(method, tmp_path, stops, stopped=Terminated, **SETTINGS["accumulating"])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["validation start", "validation batch", "validation end"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_signalled_in_a_validation(setting: str, where: str, tmp_path: Path) -> None:
    count = 3 if where == "validation batch" else 1  # of the second validation
    assert_same_end(METHODS[0], tmp_path, [SignalAt(where, count)], stopped=Terminated, **SETTINGS[setting])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_status_says_which_signal(number: signal.Signals, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(Terminated) as caught:
        run(METHODS[0], tmp_path, [SignalAt("batch end", 4, number)], max_epochs=1)
    assert caught.value.code == 128 + number
    last = tmp_path / "last.ckpt"
    assert f"stopped by {number.name} after step 5, all to step 5 is in {last}" in capsys.readouterr().err
    assert torch.load(last, weights_only=True)["global_step"] == 5
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # as it was before the fit


class Slow(SignalAt):
    """Every micro-batch takes a while."""

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.05)
        super().on_train_batch_end(*args)


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
@pytest.mark.parametrize("count", [3, 13])
def test_a_long_accumulation_is_not_waited_for(method: type[MethodModule], count: int, tmp_path: Path) -> None:
    """One optimizer step an epoch of 9 or 10 micro-batches; only the gradients of those since are lost."""
    options: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": 10}
    begun = time.monotonic()
    stop = Slow("batch start", count)
    with pytest.raises(Terminated):
        run(method, tmp_path / "parts", [stop], **options)
    assert time.monotonic() - begun < 30
    assert stop.count == -1  # no micro-batch began after the one that the signal came in
    last = tmp_path / "parts" / "last.ckpt"
    assert last.exists() == (count == 13)  # in the first accumulation there is nothing to save
    assert not last.exists() or torch.load(last, weights_only=True)["global_step"] == 1
    assert_same_end(method, tmp_path, [], **options)


def test_within_a_validation_within_an_accumulation(tmp_path: Path) -> None:
    options = SETTINGS["validating inside an accumulation"]
    stops = [SignalAt("validation batch", count) for count in (0, 1, 3)]
    assert_same_end(METHODS[0], tmp_path, stops, stopped=Terminated, **options)


STOPPED = """
import os, signal, sys
from pathlib import Path
import lightning as L
from tests.contract.test_resume import rows
from tests.toy import METHODS, build, data, trainer

class Stop(L.Callback):  # the process that reads batches hangs, and this one is asked to end
    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step == 2:
            from multiprocessing import active_children
            print(*(child.pid for child in active_children()), flush=True)
            for child in active_children():
                os.kill(child.pid, signal.SIGSTOP)
            os.kill(os.getpid(), int(sys.argv[1]))

if __name__ == "__main__":
    fit = trainer(Path(sys.argv[2]), callbacks=[Stop()], max_epochs=2)
    fit.fit(build(METHODS[0]), datamodule=data(batch_size=8, rows=rows(), workers=1))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_that_reads_batches_is_not_waited_for_nor_left_behind(number: int, tmp_path: Path) -> None:
    begun = time.monotonic()
    words = [sys.executable, "-c", STOPPED, str(int(number)), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == (143 if number == signal.SIGTERM else -9), done.stderr
    assert number == signal.SIGKILL or is_whole(tmp_path / "last.ckpt")
    assert time.monotonic() - begun < 50
    (child,) = done.stdout.split()
    time.sleep(0.5)
    about = Path(f"/proc/{child}/stat")
    assert not about.exists() or about.read_text().rpartition(") ")[2].startswith("Z")  # nobody has asked for its end


OVERDUE = """
import os, signal, sys, time
from pathlib import Path
import peft_lightning.callbacks.checkpoint as checkpoint
from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from tests.contract.test_signals import METHODS, SignalAt, run

class Hang(SignalAt):  # answers signals, and does not go on
    def _tick(self, where):
        super()._tick(where)
        while where == self.where and self.count < 0:
            time.sleep(1)

save = AtomicCheckpointIO.save_checkpoint
def slow(*arguments, **options):
    time.sleep(3)
    save(*arguments, **options)

if __name__ == "__main__":
    checkpoint._PATIENCE = 1.5
    stop = (Hang if sys.argv[1] == "hangs" else SignalAt)("batch start", 2)
    if sys.argv[1] == "saves":
        AtomicCheckpointIO.save_checkpoint = slow
    run(METHODS[0], Path(sys.argv[2]), [stop], max_epochs=2)
"""


@pytest.mark.parametrize("case", ["hangs", "saves"])
def test_a_step_that_does_not_end_is_given_up_and_a_slow_disk_is_not(case: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", OVERDUE, case, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    given_up = "stopped by SIGTERM: no step has ended within 1.5 s, after which it could be saved; what is saved stays"
    assert (given_up in done.stderr) == (case == "hangs")
    assert is_whole(tmp_path / "last.ckpt") == (case == "saves")


def test_slurms_warning_is_not_answered_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would save a checkpoint of its own, requeue the job by itself, and train on."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.pytorch.trainer.connectors import signal_connector

    slurm = {
        "NTASKS": 1,
        "NTASKS_PER_NODE": 1,
        "JOB_ID": 7,
        "JOB_NAME": "train",
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    requeued: list[Any] = []
    monkeypatch.setattr(signal_connector, "call", requeued.append)
    stop, environment = SignalAt("batch end", 4, signal.SIGUSR1), SLURMEnvironment(auto_requeue=True)
    with pytest.raises(Terminated) as caught:
        run(METHODS[0], tmp_path, [stop], max_epochs=1, plugins=[environment], default_root_dir=tmp_path)
    assert caught.value.code == 138 and not requeued
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt", "metrics.csv"}
