"""What methods share that decide something from a few batches before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.functional.gradients import mean_gradients
from peft_lightning.task_module import TaskModule

__all__ = ["first_batches", "over_ranks", "teach_head", "unlabelled_inputs", "warm_up"]


def first_batches(module: TaskModule, count: int) -> Iterator[Mapping[str, Any]]:
    """The first batches of a fresh pass over the training data of this rank, on its device.

    Args:
        module: attached to a trainer that fits it.
        count: how many, if there are as many.
    """
    strategy = module.trainer.strategy
    loader = module.trainer.fit_loop._data_source.dataloader()
    for batch in islice(loader, count):
        yield strategy.batch_to_device(batch, strategy.root_device)


def unlabelled_inputs(
    module: TaskModule, batches: Iterable[Mapping[str, Any]] | None = None
) -> Iterator[Mapping[str, Tensor]]:
    """What the backbone reads of batches, one after the other, without their answers but where it writes.

    Batches without a row that counts are left out.

    Args:
        module: gives the kind of its task, and its trainer.
        batches: of the task, with labels or without. None: those of this rank, on its device, of a fresh pass over
            what the data module's ``calibration_dataloader`` gives, or else over the training data.

    Raises:
        UsageError: if no batches are given, and there is neither.
    """
    if batches is None:
        trainer, strategy = module.trainer, module.trainer.strategy
        own = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", None)
        if own is None and trainer.state.fn != "fit":
            raise UsageError(
                f"{trainer.state.fn.value if trainer.state.fn else 'trainer'}: needs unlabelled inputs, and a data "
                "module with a calibration_dataloader would give some"
            )
        loader = trainer.fit_loop._data_source.dataloader() if own is None else own()
        batches = (strategy.batch_to_device(batch, strategy.root_device) for batch in loader)
    for batch in batches:
        if "valid" in batch and not batch["valid"].any():  # a row of padding, where other ranks have one more
            continue
        inputs = dict(module.inputs(batch) if "labels" in batch else batch["inputs"])
        if "decoder_input_ids" in inputs:  # the loss needs no mask there
            inputs["decoder_attention_mask"] = (batch["labels"] != -100).long()
        yield inputs


def over_ranks(module: TaskModule, value: Tensor) -> Tensor:
    """A tensor summed over all ranks, in place; as it is where no trainer is attached."""
    return value if module._trainer is None else module.summed(value)


def warm_up(
    module: TaskModule,
    parameters: Mapping[str, nn.Parameter],
    batch_loss: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Sequence[Any],
    steps: int,
    option: str,
) -> None:
    """Some steps of Adam at a constant rate, without dropout; call it with the module held still.

    Args:
        module: gives the optimiser's settings.
        parameters: what the steps change.
        batch_loss: batch -> (sum of its examples' losses, sum of their weights).
        batches: gone through again and again.
        steps: how many.
        option: what asked for them, for the message.

    Raises:
        UsageError: if there is no batch.
    """
    if not batches:
        raise UsageError(f"{option}: there is no training batch to take steps on")
    optim = module.optim
    optimizer = torch.optim.Adam(parameters.values(), lr=optim.lr, betas=optim.betas, eps=optim.eps)
    for step in range(steps):
        batch = [batches[step % len(batches)]]
        gradients = mean_gradients(batch_loss, parameters, batch, lambda value: over_ranks(module, value))
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.step()
    optimizer.zero_grad()


def teach_head(module: TaskModule, batches: Sequence[Mapping[str, Any]], steps: int, option: str) -> None:
    """Steps of Adam on the head alone; call it with the module held still.

    Args:
        module: its backbone reads every batch once, since what the head reads does not change meanwhile.
        batches: on the module's device.
        steps: how many.
        option: what asked for them, for the message.

    Raises:
        UsageError: if there is no batch, or the head has nothing to train.
    """
    parameters = dict(module.head.named_parameters())
    if not parameters:
        raise UsageError(
            f"{option} = {steps}: a task of kind {module.task.kind} has no head of its own to teach; allowed: 0"
        )
    with torch.no_grad():
        read = [(module.states(module.inputs(batch)), batch) for batch in batches]

    def loss(pair: tuple[Tensor, Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        return module.head_loss(*pair)

    warm_up(module, parameters, loss, read, steps, option)
