"""For test_nodes.py: a callback that sends its process a signal, and a process that fills a cache beside others.

Usage: python -m tests.nodes_worker FOLDER, with torchrun; FOLDER/RANK then holds a line for each file that was built.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L

import peft_lightning.data.lock as lock
from peft_lightning import MLMDataModule, TaskDataModule
from peft_lightning.atomic import atomic_write

__all__ = ["Die"]


class Die(L.Callback):
    """Sends its process a signal, by default that of ``kill -9``, the first time that it is started; leaves the time.

    Args:
        rank: of the process that dies.
        step: after which optimizer step; 0: never.
        folder: where to write it.
        number: of the signal.
        agent: whether the process that started this one gets it.
    """

    def __init__(self, rank: int, step: int, folder: str, number: int = signal.SIGKILL, agent: bool = False) -> None:
        self.rank, self.step, self.folder, self.number = rank, step, Path(folder), number
        self.agent = agent

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and trainer.global_rank == self.rank and trainer.global_step == self.step:
            (self.folder / "killed").write_text(str(time.time()))
            os.kill(os.getppid() if self.agent else os.getpid(), self.number)


def fill(folder: Path) -> None:
    """Encode a task's splits and pack a corpus, as fast as the others do."""
    built: list[str] = []

    def slowly(path: Path, build: Any) -> None:
        built.append(path.name)
        time.sleep(0.3)
        atomic_write(path, build)

    lock.atomic_write = slowly  # type: ignore[attr-defined, assignment]
    ranks, own = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    (folder / f"ready{own}").touch()
    while len(list(folder.glob("ready*"))) < ranks:
        time.sleep(0.01)
    options: dict[str, Any] = {"cache_dir": str(folder / "cache")}
    TaskDataModule(task="toy_sentiment", tokenizer="toy", **options).setup("fit")
    MLMDataModule(inputs=str(folder / "text.txt"), vocab_size=300, block_size=16, held_out=0.2, **options).setup("fit")
    (folder / own).write_text("\n".join(built))


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
