"""Cells trained side by side: each with its own batches, head, optimiser and schedule, over one frozen backbone.

Step t of a cell sees the batch that its own loader gives at step t, and the loss is normalised as its method does it;
the gradients of the sum of all losses are those of each cell's own. What differs from a cell alone are the draws of
dropout, of which there is one stream for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.errors import PeftLightningError
from peft_lightning.seeding import step_seed
from peft_lightning.study.block import Block
from peft_lightning.study.evaluation import Scores, evaluate, joint_batches
from peft_lightning.study.loop import LoopTrainer, computing
from peft_lightning.study.outcome import LOSSES, BestEpoch, Outcome, Tick
from peft_lightning.task_module import TaskModule

__all__ = ["Prepared", "run_together"]

_Context = Callable[[], AbstractContextManager[None]]


@dataclass(kw_only=True)
class Prepared:
    """A cell before its first step.

    Attributes:
        module: prepared.
        data: its own.
        trainer: likewise.
        error: why it stopped, if it did.
    """

    module: TaskModule
    data: FewShotDataModule
    trainer: LoopTrainer
    error: Exception | None = None


class _Cell:
    """What goes on beside the shared forward pass."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.module, self.trainer = prepared, prepared.module, prepared.trainer
        made: Any = self.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = made["optimizer"]
        self.schedule: Any = made["lr_scheduler"]["scheduler"]
        self.losses: list[Tensor] = []
        self.best = BestEpoch(self.module, self.trainer.max_epochs)

    def step(self, loss: Tensor) -> None:
        """One step of the optimiser, after the gradients; an error stops this cell only."""
        if self.prepared.error is not None:
            self.optimizer.zero_grad()
            return
        self.losses.append(loss)
        try:
            self.module.on_before_optimizer_step(self.optimizer)
        except PeftLightningError as error:
            self.prepared.error = error
        else:
            self.optimizer.step()
            self.schedule.step()
            self.trainer.global_step += 1
        self.optimizer.zero_grad()


def run_together(prepared: Sequence[Prepared], select: str, tick: Tick) -> list[Outcome | Exception]:
    """Train and measure cells whose loaders have equally many batches, and whose modules are of one shape.

    A processor gains nothing from larger batches and loses by padding: there only cells that read the same rows train
    in one batch. All of them are tested in one.

    Args:
        prepared: at least one.
        select: last or best.
        tick: told of progress.
    """
    first = prepared[0].trainer
    context: _Context = partial(computing, first.precision, first.strategy.root_device)
    cells = [_Cell(one) for one in prepared]
    parts: dict[int, list[_Cell]] = {}
    apart = first.strategy.root_device.type == "cpu"
    for cell in cells:
        parts.setdefault(id(cell.prepared.data.load("train")) if apart else 0, []).append(cell)
    dev: dict[int, Scores] = {}
    for number, part in enumerate(parts.values()):
        block = Block([cell.module for cell in part])
        _train(part, block, context, select, partial(_part_of, tick, number, len(parts)))
        dev |= zip(map(id, part), _scores(part, block, "validation", context), strict=True)
    whole = block if len(parts) == 1 else Block([cell.module for cell in cells])
    test = _scores(cells, whole, "test", context)
    tick(1.0)
    return [
        cell.prepared.error or _outcome(cell, dev[id(cell)], scores) for cell, scores in zip(cells, test, strict=True)
    ]


def _train(cells: Sequence[_Cell], block: Block, context: _Context, select: str, tick: Tick) -> None:
    epochs = cells[0].trainer.max_epochs
    for epoch in range(epochs):
        for cell in cells:
            cell.trainer.current_epoch = epoch
        block.train(True)
        _epoch(cells, block, context)
        if select == "best":
            for cell, scores in zip(cells, _scores(cells, block, "validation", context), strict=True):
                cell.best.offer(epoch + 1, scores)
        tick((epoch + 1) / epochs)
    for cell in cells:
        cell.best.restore()


def _part_of(tick: Tick, number: int, parts: int, share: float) -> None:
    """Progress of one part of several; a tenth of the work is left for the test."""
    tick(0.9 * (number + share) / parts)


def _epoch(cells: Sequence[_Cell], block: Block, context: _Context) -> None:
    first = cells[0].trainer
    left = first.max_steps - first.current_epoch * len(first.datamodule.loader("train"))
    seeds = [cell.module.seed for cell in cells]
    data = [cell.prepared.data for cell in cells]
    batches_of_all = joint_batches(data, "train", first.strategy.root_device)
    for number, batches in enumerate(islice(batches_of_all, left)):
        torch.manual_seed(step_seed(*seeds, first.current_epoch, number))
        with context():
            losses = [
                cell.module.normalised(*cell.module.head_loss(states, batch))
                for cell, states, batch in zip(cells, block.states(batches), batches, strict=True)
            ]
        torch.stack(losses).sum().backward()
        for cell, loss in zip(cells, losses, strict=True):
            cell.step(loss.detach())


def _scores(cells: Sequence[_Cell], block: Block, stage: str, context: _Context) -> list[Scores]:
    block.train(False)
    data = [cell.prepared.data for cell in cells]
    with context():
        return evaluate([cell.module for cell in cells], data, stage, block.states)


def _outcome(cell: _Cell, dev: Scores, test: Scores) -> Outcome:
    module = cell.module
    return Outcome(
        dev=dev,
        test=test,
        losses=torch.stack(cell.losses[:LOSSES]).tolist() if cell.losses else [],
        steps=cell.trainer.global_step,
        epoch=cell.best.epoch,
        skipped=module.skipped_steps,
        trained_parameters=int(module.summary()["trained_parameters"]),
    )
