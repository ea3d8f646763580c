"""Being asked to end: SIGTERM, as clusters and service managers send it, and SIGUSR1, with which SLURM gives notice.

The exit status is 128 and the signal's number, as a shell reports it: 143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C.
Outside the training loop there is no state to save, and a process ends where it is: files are written whole or not at
all. Inside of it, callbacks/checkpoint decides.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SIGNALS", "Terminated", "ends_on_signals", "take_over"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Terminated(SystemExit):
    """The process was asked to end; ``code`` is its exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def take_over(signals: tuple[signal.Signals, ...], react: Callable[[int], object]) -> dict[signal.Signals, Any]:
    """Have ``react`` called with the number of each signal that comes.

    Processes that this one forks later, such as those that read batches, end at once instead.

    Returns:
        What handled the signals before; nothing outside the main thread, where Python refuses.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        react(number)

    return {number: signal.signal(number, handle) for number in signals}


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """Within this, the signals end the process by an exception, which lets go of files and locks on its way."""

    def end(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)  # once more ends it at once
        sys.stderr.write(f"\nstopped by {signal.Signals(number).name}: nothing was trained that could be lost\n")
        raise Terminated(number)

    before = take_over((*SIGNALS, signal.SIGINT), end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
