"""A signal where nothing is trained yet ends the process at once, cleanly, with a status that says which one it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import peft_lightning.methods.mera as mera
from peft_lightning.cli.main import main
from peft_lightning.data.loader import Loader
from peft_lightning.methods import MerAModule, PruneLoRAModule, SparseAdapterModule
from peft_lightning.stopping import SIGNALS, Terminated, ends_on_signals, take_over
from tests.cli.test_bad_input import FIT
from tests.contract.test_resume import assert_same_end, run


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_the_status_and_what_handled_it_before(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as caught, ends_on_signals():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number == {"SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130}[number.name]
    assert signal.getsignal(number) == before
    assert f"stopped by {number.name}: nothing was trained that could be lost" in capsys.readouterr().err


def test_why_it_ends_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second run in the same process says its own
        with pytest.raises(Terminated), ends_on_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGUSR1)  # from another process that ends for the same reason
        assert capsys.readouterr().err.count("stopped by") == 1


def test_a_process_that_was_forked_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with ends_on_signals():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    assert capfd.readouterr().err == ""


def test_elsewhere_than_in_the_main_thread_nothing_is_touched() -> None:
    import threading

    def inside() -> None:
        with ends_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [before]


WAITING = """
import os, signal, sys, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from peft_lightning.stopping import ends_on_signals, take_over

def wait():
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    ask = lambda: os.kill(os.getpid(), int(sys.argv[1]))
    threading.Timer(0.5, ask).start()
    store.wait(["what nobody sets"])  # in C++, without Python's lock

with ends_on_signals():
    if sys.argv[2] == "in training":
        take_over((signal.SIGTERM, signal.SIGINT), print, patience=4)
    if sys.argv[2] == "while it writes":
        done = time.monotonic() + 4
        take_over((signal.SIGTERM,), print, patience=2, waits=lambda: time.monotonic() > done)
    if sys.argv[2] == "a child's":
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
        os.waitpid(child, 0)
        signal.sigtimedwait([signal.SIGUSR2], 3)
    else:
        wait()
"""


@pytest.mark.parametrize(
    ("number", "where", "said", "seconds"),
    [
        (15, "before", 2, 2),
        (2, "before", 2, 2),
        (10, "before", 8, 8),
        (15, "in training", 4, 4),
        (15, "while it writes", 2, 6),
    ],
)
def test_a_process_that_waits_in_a_library_ends(number: int, where: str, said: int, seconds: float) -> None:
    begun = time.monotonic()
    words = [sys.executable, "-c", WAITING, str(number), where]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + number
    assert done.stderr.splitlines()[1:] == [
        f"stopped by {signal.Signals(number).name}: not answered within {said} s, in a library that waits, as for "
        "another process; what is saved stays"
    ]
    assert seconds < time.monotonic() - begun < 40


def test_a_signal_to_a_child_is_not_this_process_s() -> None:
    done = subprocess.run([sys.executable, "-c", WAITING, "0", "a child's"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_answered_has_all_the_time_that_it_takes() -> None:
    with ends_on_signals():
        take_over((signal.SIGTERM,), lambda number: time.sleep(1.5), patience=0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


def asked(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Have the process asked to end when a function is called, or what it gives is read."""
    function = getattr(owner, name)

    def asking(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    patch.setattr(owner, name, asking)


@pytest.mark.parametrize(
    ("method", "owner", "name"),
    [
        pytest.param(SparseAdapterModule, Loader, "__iter__", id="scoring"),
        pytest.param(PruneLoRAModule, Loader, "__iter__", id="measuring"),
        pytest.param(MerAModule, Loader, "__iter__", id="reading for a merge"),
        pytest.param(MerAModule, mera, "merge_adapters", id="merging"),
        pytest.param(SparseAdapterModule, os, "fsync", id="caching"),
    ],
)
def test_before_the_first_step(method: Any, owner: Any, name: str, tmp_path: Path, cache_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Terminated), ends_on_signals():
        asked(patch, owner, name)
        run(method, tmp_path / "parts", [], max_epochs=1)
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same_end(method, tmp_path, [], max_epochs=1)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])
    words = [*FIT, "--run_dir", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        asked(patch, Loader, "__iter__")
        main(words)
    assert caught.value.code == 143
    assert "Traceback" not in capsys.readouterr().err
    main(words)  # what was left is in nobody's way
    assert (tmp_path / "run" / "report.json").exists()
