"""Cells trained side by side: each with its own batches, head, optimiser and schedule, over one frozen backbone.

Step t of a cell sees the batch that its own loader gives at step t, and the loss is normalised as its method does it;
the gradients of the sum of all losses are those of each cell's own. What differs from a cell alone are the draws of
dropout, of which there is one stream for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.errors import PeftLightningError
from peft_lightning.seeding import step_seed
from peft_lightning.study.block import Block
from peft_lightning.study.evaluation import Scores, States, evaluate, joint_batches
from peft_lightning.study.loop import LoopTrainer, computing
from peft_lightning.study.outcome import LOSSES, BestEpoch, Outcome, Tick
from peft_lightning.task_module import TaskModule

__all__ = ["Prepared", "run_together"]


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

    Args:
        prepared: at least one.
        select: last or best.
        tick: told of progress.
    """
    trainer = prepared[0].trainer
    context = partial(computing, trainer.precision, trainer.strategy.root_device)
    block = Block([one.module for one in prepared])
    cells = [_Cell(one) for one in prepared]
    for epoch in range(trainer.max_epochs):
        block.train(True)
        for cell in cells:
            cell.trainer.current_epoch = epoch
        _epoch(cells, block, context)
        if select == "best":
            for cell, scores in zip(cells, _scores(prepared, block, "validation", context), strict=True):
                cell.best.offer(epoch + 1, scores)
        tick((epoch + 1) / (trainer.max_epochs + 1))
    for cell in cells:
        cell.best.restore()
    dev, test = (_scores(prepared, block, stage, context) for stage in ("validation", "test"))
    tick(1.0)
    return [one.error or _outcome(cell, *scores) for one, cell, *scores in zip(prepared, cells, dev, test, strict=True)]


def _epoch(cells: Sequence[_Cell], block: Block, context: partial[AbstractContextManager[None]]) -> None:
    first = cells[0].trainer
    seeds = [cell.module.seed for cell in cells]
    data = [cell.prepared.data for cell in cells]
    for number, batches in enumerate(joint_batches(data, "train", first.strategy.root_device)):
        torch.manual_seed(step_seed(*seeds, first.current_epoch, number))
        with context():
            losses = [
                cell.module.normalised(*cell.module.head_loss(states, batch))
                for cell, states, batch in zip(cells, block.states(batches), batches, strict=True)
            ]
        torch.stack(losses).sum().backward()
        for cell, loss in zip(cells, losses, strict=True):
            cell.step(loss.detach())


def _scores(
    prepared: Sequence[Prepared], block: Block, stage: str, context: partial[AbstractContextManager[None]]
) -> list[Scores]:
    block.train(False)
    states: States = block.states
    with context():
        return evaluate([one.module for one in prepared], [one.data for one in prepared], stage, states)


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
