"""Run by test_kills.py in processes of its own: one fit, which ends itself by kill -9 where ``KILL`` says.

``KILL`` is ``PHASE:COUNT``: the moments of each phase are counted from 0. Without it a fit only counts them.

- caching: around all that happens to files before anything is trained: each write, flush and renaming;
- deciding: each batch that is read before training (scores, importance, merges, the first step's), and around a merge;
- step: each micro-batch begins;
- backward: each micro-batch's gradients are there, and nothing else yet;
- optimizer: before each optimizer step, and after it;
- checkpointing: each write of a part of a checkpoint, each flush, naming and renaming, before and after;
- validating: each batch of a validation.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch

import peft_lightning.files.checksum as checksum
import peft_lightning.methods as methods
import peft_lightning.methods.mera as mera
from peft_lightning import MLMDataModule
from peft_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from peft_lightning.data.loader import Loader
from peft_lightning.data.toy import toy_rows
from peft_lightning.files.latest import latest_checkpoint
from tests.toy import build, data, trainer

SIZES = {"train": 43, "validation": 12, "test": 4}


class Moments:
    """Counts what comes by, and ends the process at the moment that was asked for."""

    def __init__(self, kill: str | None) -> None:
        self.phase, count = kill.split(":") if kill else ("", "-1")
        self.count = int(count)
        self.seen: Counter[str] = Counter()
        self.trains = self.saves = False

    def tick(self, phase: str) -> None:
        """One more moment of a phase."""
        if phase == self.phase and self.seen[phase] == self.count:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen[phase] += 1

    def file(self) -> None:
        """One more moment of what happens to files."""
        if self.saves:
            self.tick("checkpointing")
        elif not self.trains:
            self.tick("caching")

    def around(self, owner: Any, name: str, tick: Any) -> None:
        """Have a function tick before and after it runs."""
        function = getattr(owner, name)

        def ticking(*args: Any, **options: Any) -> Any:
            tick()
            found = function(*args, **options)
            tick()
            return found

        setattr(owner, name, ticking)

    def install(self) -> None:
        """Watch files, the reading of batches and merges of this process."""
        for name in ("fsync", "link", "replace"):
            self.around(os, name, self.file)
        self.around(checksum._Summed, "write", self.file)
        self.around(mera, "merge_adapters", lambda: self.tick("deciding"))
        save, read = AtomicCheckpointIO.save_checkpoint, Loader.__iter__

        def saving(*args: Any, **options: Any) -> None:
            self.saves = True
            save(*args, **options)
            self.saves = False

        def reading(loader: Loader) -> Any:
            for batch in read(loader):
                if not self.trains:
                    self.tick("deciding")
                yield batch

        AtomicCheckpointIO.save_checkpoint = saving  # type: ignore[method-assign]
        Loader.__iter__ = reading  # type: ignore[method-assign]


class Watch(L.Callback):
    """Ticks in training."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_train_batch_start(self, *args: Any) -> None:
        self.moments.trains = True
        self.moments.tick("step")

    def on_after_backward(self, *args: Any) -> None:
        self.moments.tick("backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.moments.tick("optimizer")

    def on_before_zero_grad(self, *args: Any) -> None:
        self.moments.tick("optimizer")

    def on_validation_batch_start(self, *args: Any) -> None:
        self.moments.tick("validating")


def join(ranks: int, rank: int, port: int, strategy: str = "ddp") -> dict[str, Any]:
    """Become one of several processes, as torchrun starts them; what the trainer has to know of it."""
    torch.set_num_threads(1)
    if ranks == 1:
        return {}
    here: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    here |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({key: str(value) for key, value in here.items()})
    return {"strategy": strategy, "devices": ranks}


def fit(
    name: str,
    folder: Path,
    given: dict[str, Any],
    ranks: int,
    rank: int,
    port: int,
    kill: str | None,
    strategy: str = "ddp",
) -> None:
    """The same run each time it is called; it goes on from what it finds in ``folder``.

    Args:
        name: of the method.
        folder: the run's.
        given: folders that both are made from: ``sources`` of adapters, ``corpus`` of texts; and a cache.
        ranks: how many processes train, of which this one is ``rank``; they meet at ``port``.
        kill: where this one ends.
        strategy: of several processes.
    """
    many = join(ranks, rank, port, strategy)
    os.environ["PEFT_LIGHTNING_CACHE"] = str(folder / "cache")
    moments = Moments(kill)
    moments.install()
    method = getattr(methods, name)
    options = {"sources": given["sources"]} if name in ("MerAModule", "FusionModule") else {}
    run = trainer(
        folder, every_n_steps=2, callbacks=[Watch(moments)], max_epochs=2, accumulate_grad_batches=3,
        val_check_interval=4, **many,
    )  # fmt: skip
    source: Any = MLMDataModule(inputs=given["corpus"], tokenizer="toy", block_size=16, batch_size=8 // ranks)
    if name != "SCTDPretrainModule":
        rows = {split: toy_rows("toy_sentiment", split, size=size) for split, size in SIZES.items()}
        source = data(batch_size=8 // ranks, rows=rows)
    last, _ = latest_checkpoint(folder)
    path = None if last is None else str(last)
    run.fit(build(method, **options), datamodule=source, ckpt_path=path, weights_only=True)
    if rank == 0:
        (folder / "moments.json").write_text(json.dumps(moments.seen))
