"""Being asked to end: SIGTERM, as clusters and service managers send it, and SIGUSR1, with which SLURM gives notice.

The exit status is 128 and the signal's number, as a shell reports it: 143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C.
Outside the training loop there is no state to save, and a process ends where it is: files are written whole or not at
all. Inside of it, callbacks/checkpoint decides.

Python answers a signal in its main thread, and only between two of its own instructions. Where that thread waits in a
library meanwhile, such as for another process that does not come, a second thread ends the process. So it does where a
signal was answered, but what the answer waits for does not come (:func:`end_later`).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = ["SIGNALS", "Terminated", "end_later", "ends_on_signals", "take_over"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SOON = 2.0
_LOOK = 0.2  # seconds
_NOTICE = 4.0


class _Watch:
    """Hears of signals as they come, and ends the process where one is not answered in time."""

    def __init__(self) -> None:
        self.patience = _SOON
        self.last: Callable[[], object] = lambda: None
        self.waits: Callable[[], bool | None] = lambda: True
        self._answers: dict[int, float] = {}
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._closed = False
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def answered(self, number: int) -> None:
        """The main thread has got to it."""
        self._answers[number] = time.monotonic()

    def close(self) -> None:
        """End the thread; what is not answered is forgotten."""
        self._closed = True
        signal.set_wakeup_fd(self._before)
        self._told.close()

    def _listen(self) -> None:
        while numbers := self._heard.recv(64):
            for number in {*numbers} & {*SIGNALS, signal.SIGINT}:
                why = "not answered within {:g} s, in a library that waits, as for another process"
                end_later(number, partial(self._unanswered, number, time.monotonic()), self.patience, self.last, why)
        self._heard.close()

    def _unanswered(self, number: int, heard: float) -> bool | None:
        # the answer may be a little older than what this thread has heard
        if self._closed or self._answers.get(number, -math.inf) > heard - 1:
            return None
        return self.waits() is not False


def end_later(
    number: int, waits: Callable[[], bool | None], patience: float, last: Callable[[], object], why: str
) -> None:
    """End the process from a second thread, where what a signal has asked for does not come.

    Args:
        number: of the signal.
        waits: true while the time runs; false while it does not, such as while a file is written; None once there is
            nothing to wait for.
        patience: seconds, which begin again whenever ``waits`` was false; SIGUSR1, which comes long before the end,
            gets four times as many.
        last: called before the process ends.
        why: what is said then; ``{:g}`` in it stands for the seconds.
    """
    patience *= _NOTICE if number == signal.SIGUSR1 else 1

    def look() -> None:
        until = time.monotonic() + patience
        while (waiting := waits()) is not None:
            if not waiting:
                until = time.monotonic() + patience
            elif time.monotonic() > until:
                last()
                said = f"\nstopped by {signal.Signals(number).name}: {why.format(patience)}; what is saved stays\n"
                os.write(2, said.encode())
                os._exit(128 + number)
            time.sleep(_LOOK)

    threading.Thread(target=look, name="overdue", daemon=True).start()


_watch: _Watch | None = None


def _is_a_child() -> None:
    if _watch is not None:  # its signals are not this process's
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_is_a_child)


class Terminated(SystemExit):
    """The process was asked to end; ``code`` is its exit status."""

    on_its_way = False  # the process says why it ends but once

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        Terminated.on_its_way = True

    @staticmethod
    def end_children() -> None:
        """End the processes that read batches: one that is stopped or hangs would be waited for without an end."""
        children = [child for child in multiprocessing.active_children() if child.daemon]
        in_main = threading.current_thread() is threading.main_thread()
        # torch's would say that they were killed
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if children and in_main else None
        for child in children:
            child.kill()
            child.join(_SOON)
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def take_over(
    signals: tuple[signal.Signals, ...],
    react: Callable[[int], object],
    patience: float = _SOON,
    last: Callable[[], object] = lambda: None,
    waits: Callable[[], bool | None] = lambda: True,
) -> dict[signal.Signals, Any]:
    """Have ``react`` called with the number of each signal that comes.

    Processes that this one forks later, such as those that read batches, end at once instead.

    Args:
        signals: that are taken over.
        react: called in the main thread.
        patience: seconds after which, within :func:`ends_on_signals`, the process is ended if that is not possible.
        last: called before that, in another thread.
        waits: false while the time does not run, as in :func:`end_later`.

    Returns:
        What handled the signals before; nothing outside the main thread, where Python refuses.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        if _watch is not None:
            _watch.answered(number)
        react(number)

    if _watch is not None:
        _watch.patience, _watch.last, _watch.waits = patience, last, waits
    return {number: signal.signal(number, handle) for number in signals}


@contextmanager
def ends_on_signals(left: str = "nothing was trained that could be lost") -> Iterator[None]:
    """Within this, the signals end the process by an exception, which lets go of files and locks on its way.

    Args:
        left: what is said then of what has been done.
    """

    def end(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)  # once more ends it at once
        if not Terminated.on_its_way:
            sys.stderr.write(f"\nstopped by {signal.Signals(number).name}: {left}\n")
        raise Terminated(number)

    global _watch
    Terminated.on_its_way = False
    before = take_over((*SIGNALS, signal.SIGINT), end)
    watch = _Watch() if before and _watch is None else None
    _watch = _watch or watch
    try:
        yield
    except Terminated:
        Terminated.end_children()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if watch is not None:
            watch.close()
            _watch = None
