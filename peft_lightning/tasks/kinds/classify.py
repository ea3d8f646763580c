"""One class out of a few for a text or a pair of texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Kind, Model
from peft_lightning.tasks.losses import float32, weights_for
from peft_lightning.tasks.rows import whole_number
from peft_lightning.tasks.table import Task


class Classify(Kind):
    """Softmax over the classes of ``task.labels``.

    A label is a class's name, or its number (a boolean is one where there are two classes). A name comes first, so
    that classes called "1" and "2", or "true" and "false", mean the same in every file format.

    A subclass may have the option ``id``, a column that is handed on to the answers with all else in ``reference``.

    Raises:
        UsageError: the task names fewer than two classes, or ``id`` is no text.
    """

    classifies = True
    trivial = "majority class"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if len(task.labels) < 2:
            names = list(task.labels)
            raise UsageError(f"task.labels is {names}; allowed for kind {task.kind}: two names or more")
        if not isinstance(self.settings.get("id", ""), str):
            raise UsageError(f"task.options.id is {self.settings['id']!r}; allowed: a text")

    @property
    def num_outputs(self) -> int:
        """Number of classes."""
        return len(self.task.labels)

    def target(self, value: Any) -> int:
        """Return the number of the class ``value``."""
        for name in (str(value), str(value).lower()) if isinstance(value, bool) else (str(value),):
            if name in self.task.labels:
                return self.task.labels.index(name)
        if isinstance(value, str) and len(value) < 20 and value.strip().isdecimal():
            value = int(value)
        number = int(value) if isinstance(value, bool) and self.num_outputs == 2 else whole_number(value)
        if number is not None and 0 <= number < self.num_outputs:
            return number
        numbers, names = f"0 to {self.num_outputs - 1}", ", ".join(self.task.labels)
        raise DataError(f"the label is {repr(value)[:200]}; allowed: {numbers}, or one of {names}")

    def classes(self, target: Any = None) -> tuple[str, ...]:
        """Return the name of the class ``target``, or all names."""
        return self.task.labels if target is None else (self.task.labels[target],)

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy times the weight of the label's class, and that weight."""
        labels_B = batch["labels"]
        outputs_BC = float32(outputs)
        weights_C = weights_for(outputs_BC, class_weights)
        return F.cross_entropy(outputs_BC, labels_B, weights_C, reduction="none"), weights_C[labels_B]

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Tensor:
        """Return the class with the largest output, int64 [B]."""
        return outputs.argmax(-1)

    def constant(self, labels: Tensor) -> Tensor:
        """Return the most frequent class, the smallest if several are."""
        return torch.bincount(labels, minlength=self.num_outputs).argmax()

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"label": name, "probabilities": {name: probability}}`` per row, and what names it, if anything."""
        answers = []
        names = batch.get("references", [{}] * len(outputs))
        for named, row in zip(names, outputs.float().softmax(-1).tolist(), strict=True):
            label = self.task.labels[row.index(max(row))]
            answers.append({**named, "label": label, "probabilities": dict(zip(self.task.labels, row, strict=True))})
        return answers
