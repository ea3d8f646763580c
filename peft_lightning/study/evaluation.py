"""How good cells are: their metrics, and what they said to every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.batch import Batch

__all__ = ["Scores", "evaluate", "joint_batches", "majority"]

States = Callable[[Sequence[Batch]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one cell on one set of rows.

    Attributes:
        metrics: the task's, in its order, and ``loss``.
        predictions: a plain value a row, in the order of the rows' numbers.
        truths: what the metrics compared them with.
    """

    metrics: dict[str, float]
    predictions: list[Any]
    truths: list[Any]


class _Sheet:
    """What is collected of one cell."""

    def __init__(self, module: TaskModule) -> None:
        self.module = module
        self.metrics = module.kind.metrics().to(module.device)
        self.loss = self.weight = 0.0
        self.rows: list[int] = []
        self.found: list[list[Any]] = [[], []]

    def add(self, outputs: Tensor, batch: Batch) -> None:
        module = self.module
        losses_B, weights_B = module.kind.losses(outputs, batch, module.class_weights)
        self.loss += float(losses_B.double().sum())
        self.weight += float(weights_B.double().sum())
        found = module.kind.predictions(outputs, batch, module), module.kind.truths(batch)
        self.metrics.update(*found)
        self.rows += batch["rows"].tolist()
        for values, kept in zip(found, self.found, strict=True):
            kept += _plain(values)

    def scores(self) -> Scores:
        values = {name: float(metric.compute()) for name, metric in self.metrics.items(keep_base=True)}
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        predictions, truths = ([values[place] for place in order] for values in self.found)
        metrics = {**values, "loss": self.loss / self.weight if self.weight else 0.0}
        return Scores(metrics=metrics, predictions=predictions, truths=truths)


@torch.inference_mode()
def evaluate(
    modules: Sequence[TaskModule], data: Sequence[FewShotDataModule], stage: str, states: States | None = None
) -> list[Scores]:
    """Score built modules on a stage's rows, each on its own data.

    Args:
        modules: in evaluation mode.
        data: of each; their stages have equally many batches.
        stage: validation or test.
        states: batches -> what the heads read; None: each module's own way.
    """
    sheets = [_Sheet(module) for module in modules]
    for batches in joint_batches(data, stage, modules[0].device):
        if states is None:
            outputs = [
                torch.empty(0) if module.kind.generates else module(module.inputs(batch))
                for module, batch in zip(modules, batches, strict=True)
            ]
        else:
            outputs = [
                module.kind.outputs(module.head(states_of), module.inputs(batch))
                for module, states_of, batch in zip(modules, states(batches), batches, strict=True)
            ]
        for sheet, output, batch in zip(sheets, outputs, batches, strict=True):
            sheet.add(output, batch)
    return [sheet.scores() for sheet in sheets]


def joint_batches(
    data: Sequence[FewShotDataModule], stage: str, device: torch.device
) -> Iterable[list[Mapping[str, Any]]]:
    """Yield a batch of each data module at a time; those over the same rows in the same order give one object."""
    first: dict[tuple[int, ...], int] = {}
    places = [first.setdefault(_stream(one, stage), len(first)) for one in data]
    own = [data[places.index(place)] for place in range(len(first))]
    for batches in zip(*(one.loader(stage) for one in own), strict=True):
        moved = [move_data_to_device(batch, device) for batch in batches]
        yield [moved[place] for place in places]


def majority(module: TaskModule, data: FewShotDataModule) -> dict[str, float]:
    """Metrics on the test rows of their kind's trivial answer."""
    metrics = module.kind.metrics()
    for found in module.kind.baseline(_TestRows(data), "test"):
        metrics.update(*found)
    return {name: float(metric.compute()) for name, metric in metrics.items(keep_base=True)}


class _TestRows:
    """The test rows in place of every stage: few shots, balanced, say nothing of what is frequent."""

    def __init__(self, data: FewShotDataModule) -> None:
        self.data = data

    def labels(self, stage: str) -> Tensor:
        return self.data.labels("test")

    def batches(self, stage: str) -> Iterator[Batch]:
        return self.data.batches("test")


def _stream(data: FewShotDataModule, stage: str) -> tuple[int, ...]:
    """What is equal where batches are."""
    training = stage == "train"
    size = data.batch_size if training else data.eval_batch_size
    return id(data.load(stage)), size, data.seed if training else 0


def _plain(values: Any) -> list[Any]:
    """A list of plain values."""
    return values.tolist() if isinstance(values, Tensor) else [_value(value) for value in values]


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _value(part) for key, part in value.items()}
    return [_value(part) for part in value] if isinstance(value, list | tuple) else value
