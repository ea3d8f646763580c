"""Any number of classes for a text or a pair of texts: none, one or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Model
from peft_lightning.tasks.kinds.classify import Classify
from peft_lightning.tasks.losses import float32, weights_for
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

__all__ = ["MultiLabel"]


class MultiLabel(Classify):
    """A yes or no for each class of ``task.labels``, each from a sigmoid of its own.

    A label is a list of names or numbers of classes, which may be empty. The loss of a row is the mean of its
    classes' binary cross-entropies, weighted by ``class_weights`` where there are any; every row weighs the same.

    Options:
        threshold: a class is predicted where its probability is above it.
        id: a column that is handed on to the answers.

    Raises:
        UsageError: an option has a value that is not allowed, or the task names fewer than two classes.
    """

    options = {"threshold": 0.5, "id": ""}
    # Other libraries would read such a head as a softmax.
    classifies = False
    trivial = "the classes of most rows"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        threshold = self.settings["threshold"]
        if not isinstance(threshold, float) or not 0 < threshold < 1:
            raise UsageError(f"task.options.threshold is {threshold!r}; allowed: a number between 0 and 1")

    def target(self, value: Any) -> list[int]:  # type: ignore[override]
        """Return for each class whether the list ``value`` holds it: 1 or 0."""
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            names = ", ".join(self.task.labels)
            given = f"the label is {value!r}; CSV has no lists" if isinstance(value, str) else f"the label is {value!r}"
            raise DataError(f"{given}; allowed: a list of any of {names}, or of their numbers")
        target = [0] * self.num_outputs
        for item in value:
            if isinstance(item, bool):
                raise DataError(f"the label is {value!r}; allowed: names or numbers of classes, not true or false")
            number = super().target(item)
            if target[number]:
                raise DataError(
                    f"the label is {value!r}, which has class {self.task.labels[number]} twice; "
                    "allowed: each class once, by name or number (not a 0 or 1 for each class)"
                )
            target[number] = 1
        return target

    def classes(self, target: Any = None) -> tuple[str, ...]:
        """Return the names of a row's classes, or all names."""
        labels = self.task.labels
        return labels if target is None else tuple(name for name, has in zip(labels, target, strict=True) if has)

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode the texts; see :meth:`Kind.encode`."""
        columns = super().encode(rows, tokenizer, max_length, labelled, references, first_row)
        if references and self.settings["id"]:
            columns["reference"] = self.records({"id": rows[self.settings["id"]]})
        return columns

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean binary cross-entropy over the classes, and 1."""
        outputs_BC = float32(outputs)
        labels_BC = batch["labels"].to(outputs_BC)
        weights_C = weights_for(outputs_BC, class_weights)
        losses_BC = F.binary_cross_entropy_with_logits(outputs_BC, labels_BC, reduction="none")
        return losses_BC @ (weights_C / weights_C.sum()), outputs_BC.new_ones(len(outputs_BC))

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Tensor:
        """Return which classes are above the threshold, int64 [B, C]."""
        return (outputs.float().sigmoid() > self.settings["threshold"]).long()

    def metrics(self) -> MetricCollection:
        """Return fresh metrics under the names that the task gives.

        Raises:
            UsageError: a name is not allowed for this kind.
        """
        from peft_lightning.tasks.metrics import collect
        from peft_lightning.tasks.set_metrics import ExactMetric, LabelF1Metric

        f1 = {f"f1_{average}": LabelF1Metric(self.num_outputs, average) for average in ("micro", "macro")}
        return collect(self.task.metrics, {**f1, "accuracy": ExactMetric()}, "kind multilabel")

    def constant(self, labels: Tensor) -> Tensor:
        """Return the classes that more than half of the rows have, or else the most frequent one."""
        share_C = labels.double().mean(0)
        most_C = (share_C > 0.5).long()
        return most_C if most_C.any() else F.one_hot(share_C.argmax(), len(share_C))

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"labels": [name], "probabilities": {name: probability}}`` per row, and its id if it has one."""
        rows = outputs.float().sigmoid().tolist()
        found = self.predictions(outputs, batch, model).tolist()
        ids = batch.get("references", [{}] * len(rows))
        answers = []
        for named, row, chosen in zip(ids, rows, found, strict=True):
            labels = [name for name, yes in zip(self.task.labels, chosen, strict=True) if yes]
            answers.append({**named, "labels": labels, "probabilities": dict(zip(self.task.labels, row, strict=True))})
        return answers
