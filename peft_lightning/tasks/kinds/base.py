"""What every kind of task shares: the interface between data and training.

A kind knows what is encoded, which head reads the backbone, and how logits become a loss, a prediction and an
answer. It is found by its name, without a registry: ``kind: foo`` is the class ``Foo`` in
``tasks/kinds/foo.py``, and a dotted path is a class anywhere.

Shapes: B examples of a batch, C outputs, H width of the backbone.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks import kinds
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase


class Kind(ABC):
    """How one kind of task is encoded, predicted and scored."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number C of logits for one example."""

    @abstractmethod
    def target(self, value: Any) -> int | float | list[int]:
        """Return the label ``value`` as the number, or the list of numbers, to train on.

        Raises:
            DataError: ``value`` is not allowed; the message says what is.
        """

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the SUM of the losses and the SUM of the weights, two float32 scalars.

        The caller divides by the weight of the whole global batch. So ranks and batches of different sizes
        give the same loss as one process does.

        Args:
            logits: [B, C].
            labels: [B].
            class_weights: [C], or None.
        """

    @abstractmethod
    def predictions(self, logits: Tensor) -> Tensor:
        """Return [B], what the metrics compare with the labels, for ``logits`` [B, C]."""

    @abstractmethod
    def constant(self, labels: Tensor) -> Tensor:
        """Return the scalar that predicts ``labels`` [N] best without looking: every result's baseline."""

    @abstractmethod
    def decode(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return one answer per row of ``logits`` [B, C], of plain Python values."""

    def head(self, hidden_size: int, style: str, dropout: float) -> nn.Module:
        """Return a new head that maps the backbone's states [B, L, H] to logits [B, C]."""
        from peft_lightning.layers.heads import ClassificationHead

        return ClassificationHead(hidden_size, self.num_outputs, style, dropout)

    def metrics(self) -> MetricCollection:
        """Return fresh metrics under the names that the task gives.

        Raises:
            UsageError: a name is not allowed for this task.
        """
        from peft_lightning.tasks.metrics import build_metrics

        return build_metrics(self.task.metrics, self.num_outputs)

    def columns(self, labelled: bool) -> tuple[str, ...]:
        """Return the columns that :meth:`encode` reads."""
        return (*self.task.text, self.task.label) if labelled else self.task.text

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        first_row: int = 0,
    ) -> dict[str, list[Any]]:
        """Encode a slice of a split.

        Args:
            rows: the columns; each holds one value per row.
            tokenizer: any tokenizer of transformers.
            max_length: number of tokens to which a text or a pair is cut.
            labelled: whether to read the label column too.
            first_row: number of the slice's first row in the split, for messages.

        Returns:
            ``input_ids`` and, if the tokenizer gives them, ``token_type_ids`` (a list of numbers per row),
            and ``labels`` (a number, or a list of them, per row) if ``labelled``.

        Raises:
            DataError: a text is no string, or a label is not allowed; the message names the row.
        """
        for column in self.task.text:
            for number, text in enumerate(rows[column], first_row):
                if not isinstance(text, str):
                    raise DataError(f"row {number}, column {column!r}: {text!r} is not a text")
        texts = [list(rows[column]) for column in self.task.text]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        if labelled:
            columns["labels"] = self._targets(rows[self.task.label], first_row)
        return columns

    def _targets(self, values: Sequence[Any], first_row: int) -> list[int | float | list[int]]:
        targets: list[int | float | list[int]] = []
        for number, value in enumerate(values, first_row):
            try:
                targets.append(self.target(value))
            except DataError as error:
                raise DataError(f"row {number}, column {self.task.label!r}: {error}") from None
        return targets


def build_kind(task: Task) -> Kind:
    """Return the kind of ``task``.

    Raises:
        UsageError: there is no such kind, it is no :class:`Kind`, or it refuses the task.
    """
    module, _, name = task.kind.rpartition(".")
    inside = not module
    if inside:
        known = sorted(info.name for info in pkgutil.iter_modules(kinds.__path__) if info.name != "base")
        if name not in known:
            raise UsageError(f"task.kind is {name!r}; allowed: {', '.join(known)}, or package.module.Class")
        module = f"{kinds.__name__}.{name}"
    try:
        members = vars(importlib.import_module(module))
    except ImportError as error:
        raise UsageError(f"task.kind is {task.kind!r}, which cannot be imported: {error}") from error
    found = next((value for key, value in members.items() if (key.lower() if inside else key) == name), None)
    if not (isinstance(found, type) and issubclass(found, Kind)):
        raise UsageError(f"task.kind is {task.kind!r}; allowed: a subclass of {Kind.__module__}.Kind")
    return found(task)
