"""One number for a text or a pair of texts."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.kinds.base import Kind
from peft_lightning.tasks.table import Task


class Regress(Kind):
    """Squared error on one output.

    Raises:
        UsageError: the task names classes.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.labels:
            raise UsageError(f"task.labels is {list(task.labels)}; allowed for kind regress: none")

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    def target(self, value: Any) -> float:
        """Return the finite number ``value``."""
        if type(value) is not bool and isinstance(value, Real) and math.isfinite(value):
            return float(value)
        raise DataError(f"the label is {value!r}; allowed: a finite number")

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the summed squared error and the number of examples."""
        if class_weights is not None:
            raise UsageError("class_weights is set; allowed for kind regress: null")
        error = self.predictions(logits) - labels.float()
        return (error * error).sum(), error.new_tensor(len(error))

    def predictions(self, logits: Tensor) -> Tensor:
        """Return the number itself, float32 [B]."""
        return logits[:, 0].float()

    def constant(self, labels: Tensor) -> Tensor:
        """Return the mean."""
        return labels.float().mean()

    def decode(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return ``{"score": number}`` per row."""
        return [{"score": score} for score in self.predictions(logits).tolist()]
