"""A module before, after and without the loop of a Trainer: what a study asks of it itself.

A method may decide things before its first step (what to prune, what to merge) and asks its Trainer for data and
ranks. :class:`LoopTrainer` answers as a Trainer does on one device, in the order in which Lightning calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.task_module import TaskModule

__all__ = ["LoopTrainer", "computing", "prepare"]


class LoopTrainer:
    """What methods read of a Trainer that fits them on one device, without loggers and checkpoints.

    Args:
        datamodule: whose trainer it becomes.
        device: where.
        precision: 32-true or bf16-mixed.
        epochs: how many there will be, or None.
        steps: of the optimiser, instead: epochs go on until there are as many, the last one may be cut short.
    """

    world_size = accumulate_grad_batches = num_nodes = num_devices = 1
    global_rank = local_rank = node_rank = log_every_n_steps = overfit_batches = global_step = current_epoch = 0
    is_global_zero, sanity_checking, gradient_clip_val, logger = True, False, None, None
    limit_train_batches = limit_val_batches = 1.0

    def __init__(
        self,
        datamodule: FewShotDataModule,
        device: torch.device,
        precision: str,
        epochs: int | None,
        steps: int | None = None,
    ) -> None:
        self.datamodule, self.precision = datamodule, precision
        batches = len(datamodule.loader("train"))
        self.max_epochs = math.ceil((steps or 0) / batches) if epochs is None else epochs
        self.max_steps = self.max_epochs * batches if steps is None else steps
        self.precision_plugin = _plugin(precision, device)
        self.strategy = SingleDeviceStrategy(device, precision_plugin=self.precision_plugin)
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []
        source = SimpleNamespace(dataloader=datamodule.train_dataloader)
        self.fit_loop = SimpleNamespace(_data_source=source, _combined_loader=None)
        datamodule.trainer = cast(Any, self)

    @property
    def estimated_stepping_batches(self) -> int:
        """Optimizer steps in all."""
        return self.max_steps


def prepare(module: TaskModule, trainer: LoopTrainer) -> None:
    """Take a built module to where its first step would begin.

    Raises:
        PeftLightningError: whatever the method finds wrong.
    """
    device = trainer.strategy.root_device
    module.trainer = cast(Any, trainer)
    module.setup("fit")
    module.to(device)
    module.on_fit_start()
    module.train()
    with torch.enable_grad():
        module.on_train_start()


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """The precision that a Trainer computes a forward pass in."""
    with _plugin(precision, device).forward_context():
        yield


def _plugin(precision: str, device: torch.device) -> Precision:
    return MixedPrecision("bf16-mixed", device.type) if precision == "bf16-mixed" else Precision()
