"""Where a study's groups of cells are run: in this process, or in several that each have an equal share of the threads.

A small model does not fill two cores from one process: its matrices are too small to share out. Each worker holds
backbone and rows of its own and is handed a group whenever it is free; this process alone writes files.
"""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from peft_lightning.backbones.sharing import sharing_backbones
from peft_lightning.errors import PeftLightningError, first_line
from peft_lightning.study.cells import Cell
from peft_lightning.study.progress import Progress
from peft_lightning.study.splits import Splits
from peft_lightning.study.work import Work

__all__ = ["in_this_process", "in_workers"]

Record = dict[str, Any]
Group = Sequence[Cell]


def in_this_process(groups: Sequence[Group], work: Work, progress: Progress) -> Iterator[tuple[Group, list[Record]]]:
    """Yield each group with its records, one after the other.

    Raises:
        PeftLightningError: something changed a shared backbone.
    """
    for group in groups:
        progress.begin(group)
        records = work.run(group, progress.tick)
        progress.end(group, _failures(records))
        yield group, records


def in_workers(
    groups: Sequence[Group], seeds: Sequence[int], device: torch.device, count: int, progress: Progress
) -> Iterator[tuple[Group, list[Record]]]:
    """Yield each group with its records, in the order in which they are finished.

    Args:
        groups: of cells.
        seeds: of the study's data splits.
        device: of all workers.
        count: of the workers; each has an equal share of this process's threads.
        progress: is told what begins and ends.

    Raises:
        PeftLightningError: something changed a shared backbone, or a worker died; the others are ended.
    """
    waiting = deque(groups)
    busy: dict[Any, tuple[BaseProcess, Group]] = {}

    def hand(connection: Connection, process: BaseProcess) -> None:
        if waiting:
            busy[connection] = process, waiting.popleft()
            progress.begin(busy[connection][1])
            connection.send(busy[connection][1])

    with ExitStack() as stack:
        for _ in range(count):
            hand(*stack.enter_context(_Worker(seeds, device, max(1, torch.get_num_threads() // count))))
        while busy:
            for connection in wait(list(busy)):
                process, group = busy.pop(connection)
                records = _received(connection, process)
                progress.end(group, _failures(records))
                hand(connection, process)  # type: ignore[arg-type]
                yield group, records


class _Worker:
    """A process that answers groups with records, for as long as the context lasts."""

    def __init__(self, seeds: Sequence[int], device: torch.device, threads: int) -> None:
        # a fork would inherit the threads' locks
        context = multiprocessing.get_context("spawn")
        self.connection, self._theirs = context.Pipe()
        given = self._theirs, [*seeds], str(device), threads, _levels()
        self.process = context.Process(target=_serve, args=given, daemon=True)

    def __enter__(self) -> tuple[Connection, BaseProcess]:
        self.process.start()
        # so that the end of the process is the end of the connection
        self._theirs.close()
        return self.connection, self.process

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _received(connection: Any, process: BaseProcess) -> list[Record]:
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        process.join()
        raise PeftLightningError(
            f"a worker of the study ended with code {process.exitcode} (-9 is often a lack of memory: give fewer "
            "workers); finished cells are kept, and the same command goes on with the others"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _levels() -> dict[str, int]:
    """Of the loggers of this process that have one: workers are as quiet."""
    loggers = {name: logging.getLogger(name) for name in [*logging.root.manager.loggerDict]}
    return {name: logger.level for name, logger in loggers.items() if logger.level}


def _serve(connection: Connection, seeds: list[int], device: str, threads: int, levels: dict[str, int]) -> None:
    """What a worker does."""
    torch.set_num_threads(threads)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    # the study's own process has built one of each method, and said what there is to say
    warnings.simplefilter("ignore")
    place = torch.device(device)
    try:
        with sharing_backbones(place) as shared:
            work = Work(Splits(seeds), shared, place)
            while True:
                connection.send(work.run(connection.recv(), _unheard))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the study has ended
    except PeftLightningError as error:
        connection.send(error)
    except Exception as error:
        connection.send(PeftLightningError(f"{type(error).__name__}: {first_line(error)}"))


def _unheard(share: float) -> None:
    """What a worker tells of its progress."""


def _failures(records: Sequence[Record]) -> int:
    return sum("error" in record for record in records)
