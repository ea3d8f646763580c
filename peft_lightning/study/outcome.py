"""What a cell comes to, however it was trained, and which epoch of it counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_lightning.errors import PeftLightningError
from peft_lightning.study.evaluation import Scores
from peft_lightning.task_module import TaskModule

__all__ = ["LOSSES", "BestEpoch", "Outcome", "Tick", "better"]

LOSSES = 20
"""How many first steps' losses are kept."""
Tick = Callable[[float], None]
"""Called with the share of the work that is done."""


@dataclass(kw_only=True)
class Outcome:
    """Of one cell.

    Attributes:
        dev: scores on the dev shots.
        test: on the rows that are reported on.
        losses: of the first steps.
        steps: of the optimiser.
        epoch: whose weights were measured, from 1; 0: nothing was trained.
        skipped: steps whose loss was not finite.
        trained_parameters: how many train.
    """

    dev: Scores
    test: Scores
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    epoch: int = 0
    skipped: int = 0
    trained_parameters: int = 0

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            PeftLightningError: a score is not finite.
        """
        for what in ("dev", "test"):
            for name, value in getattr(self, what).metrics.items():
                if not math.isfinite(value):
                    raise PeftLightningError(f"training has diverged: {what} {name} is {value}")


class BestEpoch:
    """Keeps the weights of the epoch that was best on the dev shots; of equal ones the first.

    Args:
        module: whose.
        epoch: the last one; its weights count if no other is ever offered.
    """

    def __init__(self, module: TaskModule, epoch: int) -> None:
        self.module, self.epoch = module, epoch
        self._scores: dict[str, float] | None = None
        self._state: dict[str, Tensor] = {}

    def offer(self, epoch: int, scores: Scores) -> None:
        """Keep the present weights if they are better than those before."""
        metric = self.module.task.metrics[0]
        if self._scores is None or better(scores.metrics, self._scores, metric):
            self.epoch, self._scores = epoch, scores.metrics
            self._state = {name: tensor.clone() for name, tensor in self.module.owned_state().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept weights back."""
        for name, tensor in self.module.owned_state().items() if self._state else ():
            tensor.copy_(self._state[name])


def better(one: dict[str, Any], other: dict[str, Any], metric: str) -> bool:
    """Whether scores are higher in a metric, or as high with a lower loss; those that are no numbers never are."""
    if math.isnan(one[metric]) or math.isnan(one["loss"]):
        return False
    if one[metric] != other[metric]:
        return bool(one[metric] > other[metric] or math.isnan(other[metric]))
    return bool(one["loss"] < other["loss"])
