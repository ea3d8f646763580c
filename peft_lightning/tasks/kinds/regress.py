"""One number for a text or a pair of texts."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Kind, Model
from peft_lightning.tasks.losses import no_weights
from peft_lightning.tasks.table import Task


class Regress(Kind):
    """Squared error on one output.

    Raises:
        UsageError: the task names classes.
    """

    classifies = True
    trivial = "the mean, always"

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

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the squared error, and 1."""
        no_weights(class_weights, "regress")
        error_B = outputs[:, 0].float() - batch["labels"].float()
        return error_B * error_B, error_B.new_ones(len(error_B))

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Tensor:
        """Return the number itself, float32 [B]."""
        return outputs[:, 0].float()

    def constant(self, labels: Tensor) -> Tensor:
        """Return the mean."""
        return labels.float().mean()

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"score": number}`` per row."""
        return [{"score": score} for score in outputs[:, 0].float().tolist()]
