"""What every kind of task shares: the interface between data and training.

A kind knows four things: how a row is encoded, which head reads the backbone, what the loss of a row is, and how
outputs become predictions for metrics and answers for people. It is found by its name, without a registry: ``kind:
foo`` is the class ``Foo`` in ``tasks/kinds/foo.py``, and a dotted path is a class anywhere.

Shapes: B rows of a batch, N sequences (B, where each row has one), L tokens, C outputs of the head, H width of the
backbone. A batch is what ``tasks/batch.py`` makes.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks import kinds
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.table import Task
from peft_lightning.trust import find_class

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

__all__ = ["Kind", "Model", "Rows", "build_kind"]


class Model(Protocol):
    """What a kind may ask of the module that it is trained in."""

    backbone: nn.Module
    head: nn.Module

    @property
    def tokenizer_name(self) -> str:
        """Folder or hub name of the tokenizer, or ``toy``."""


class Rows(Protocol):
    """What a baseline may ask of the data."""

    def labels(self, stage: str) -> Tensor:
        """All labels of a stage, [N] or [N, K]."""

    def batches(self, stage: str) -> Iterator[Batch]:
        """All rows of a stage in order, a few at a time, on the CPU; with references but for training."""


class Kind(ABC):
    """How one kind of task is encoded, predicted and scored.

    Raises:
        UsageError: the task does not fit the kind.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    """``task.options`` that the kind knows, with their defaults."""

    per_token: ClassVar[bool] = False
    """Whether the head reads every token's state, or the one that stands for the text."""

    classifies: ClassVar[bool] = False
    """Whether the head is a classifier of a text, which other libraries have words for."""

    generates: ClassVar[bool] = False
    """Whether predictions are written token by token, and need no outputs of a labelled batch."""

    style: ClassVar[str] = "dense"
    """Which head is meant by ``auto``."""

    trivial: ClassVar[str]
    """What the answers of :meth:`baseline` are called."""

    tokenizer_name = ""
    """Folder or hub name of the tokenizer of the module at hand, or ``toy``; data has no need of it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        if unknown := sorted(set(task.options) - set(self.options)):
            allowed = ", ".join(self.options) or "none"
            raise UsageError(f"task.options has {unknown[0]!r}; allowed for kind {task.kind}: {allowed}")
        self.settings = {**self.options, **task.options}

    # -- what is encoded

    @abstractmethod
    def target(self, value: Any) -> int | float | list[int]:
        """Return the label ``value`` as the number, or the list of numbers, to train on.

        Raises:
            DataError: ``value`` is not allowed; the message says what is.
        """

    def columns(self, labelled: bool) -> tuple[str, ...]:
        """Return the columns that :meth:`encode` reads."""
        names = (*self.task.text, *self.further(), self.settings.get("id"), self.task.label if labelled else "")
        return tuple(dict.fromkeys(name for name in names if name))

    def further(self) -> tuple[str, ...]:
        """Return the columns that :meth:`encode` reads beside the texts, the label and what names a row."""
        return ()

    def strings(self) -> tuple[str, ...]:
        """Return the columns of texts, which a file of plain text may make look like numbers or truth values."""
        return (*self.task.text, self.task.label) if self.task.labels else self.task.text

    def required(self) -> tuple[str, ...]:
        """Return the columns without which a row cannot be answered; what it is called is not among them."""
        return tuple(name for name in self.columns(labelled=False) if name != self.settings.get("id"))

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode a slice of a split.

        Args:
            rows: the columns; each holds one value per row.
            tokenizer: any tokenizer of transformers.
            max_length: number of tokens to which a sequence is cut.
            labelled: whether to read the label column too.
            references: whether to return what is needed beside the tensors to score and to write answers, as
                ``reference``: one JSON object a row. A kind may need none.
            first_row: number of the slice's first row in the split, for messages.

        Returns:
            Columns, a value per row: ``input_ids`` and, if the tokenizer gives them, ``token_type_ids`` (a list of
            numbers), ``labels`` (a number, or a list of them) if ``labelled``, and others: see ``tasks/batch.py``.

        Raises:
            DataError: a text is no string, or a label is not allowed; the message names the row.
        """
        texts = [self.texts(rows, column, first_row) for column in self.task.text]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        if labelled:
            columns["labels"] = self.targets_of(rows, first_row)
        return columns

    @staticmethod
    def texts(rows: Mapping[str, Sequence[Any]], column: str, first_row: int) -> list[str]:
        """Return a column of texts.

        Raises:
            DataError: a value is none.
        """
        for number, text in enumerate(rows[column], first_row):
            if not isinstance(text, str):
                raise DataError(f"row {number}, column {column!r}: {text!r} is not a text")
        return list(rows[column])

    @staticmethod
    def records(columns: Mapping[str, Sequence[Any]]) -> list[str]:
        """Return ``reference`` of columns with a value a row, without those that are none.

        What JSON does not know is written as text.
        """
        rows = (zip(columns, values, strict=True) for values in zip(*columns.values(), strict=True))
        return [json.dumps({name: value for name, value in row if value is not None}, default=str) for row in rows]

    def targets_of(self, rows: Mapping[str, Sequence[Any]], first_row: int) -> list[int | float | list[int]]:
        """Return the labels of rows.

        Raises:
            DataError: one is not allowed; names the row.
        """
        targets: list[int | float | list[int]] = []
        for number, value in enumerate(rows[self.task.label], first_row):
            try:
                targets.append(self.target(value))
            except DataError as error:
                raise DataError(f"row {number}, column {self.task.label!r}: {error}") from None
        return targets

    def classes(self, target: Any = None) -> tuple[str, ...]:
        """Return the classes of a row with this target, without one all classes: few-shot data draws rows of each."""
        return ()

    # -- what is computed

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number C of outputs of the head for one sequence, or for one token."""

    def head(self, backbone: nn.Module, style: str, dropout: float) -> nn.Module:
        """Return a new head that maps the backbone's states [N, L, H] to scores [N, C], or [N, L, C].

        Raises:
            UsageError: the style is neither dense nor linear, or the dropout, which is the head's, is not allowed.
        """
        from peft_lightning.layers.heads import ClassificationHead

        config: Any = backbone.config
        return ClassificationHead(config.hidden_size, self.num_outputs, style, dropout, per_token=self.per_token)

    def inputs(self, batch: Batch, config: Any) -> Mapping[str, Tensor]:
        """Return what the backbone and :meth:`outputs` read of a labelled batch.

        Args:
            batch: with ``labels``.
            config: the backbone's.
        """
        inputs: Mapping[str, Tensor] = batch["inputs"]
        return inputs

    def outputs(self, scores: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return what the loss and the predictions read, row by row, of the head's scores."""
        return scores

    @abstractmethod
    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return each row's loss, and its weight in the mean: two times float32 [B].

        The caller divides the sum of the losses by the sum of the weights over the whole global batch. So ranks and
        batches of different sizes give the same loss as one process does.

        Args:
            outputs: of :meth:`outputs`.
            batch: with ``labels``.
            class_weights: [C], or None.

        Raises:
            UsageError: class weights mean nothing here.
        """

    # -- what is predicted

    @abstractmethod
    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Any:
        """Return a prediction a row, as the metrics take them: [B], or a list of B."""

    def truths(self, batch: Batch) -> Any:
        """Return what the metrics compare predictions with: [B], or a list of B."""
        return batch["labels"]

    def metrics(self) -> MetricCollection:
        """Return fresh metrics under the names that the task gives; ``update`` takes predictions and truths.

        Raises:
            UsageError: a name is not allowed for this task.
        """
        from peft_lightning.tasks.metrics import build_metrics

        return build_metrics(self.task.metrics, self.num_outputs)

    @abstractmethod
    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return one answer per row, of plain Python values; ``outputs`` is empty if the kind ``generates``."""

    def official(self, answers: list[dict[str, Any]]) -> dict[str, str]:
        """Return name -> text of the files that the task's official scorer reads, for the answers of a whole split."""
        return {}

    def baseline(self, rows: Rows, stage: str) -> Iterator[tuple[Any, Any]]:
        """Yield predictions of the trivial answer, and truths: what every result has to beat.

        Here it is the constant that suits the training rows best.
        """
        labels = rows.labels(stage)
        constant = self.constant(rows.labels("train"))
        yield constant.expand(labels.shape).to(labels.dtype).contiguous(), labels

    def constant(self, labels: Tensor) -> Tensor:
        """Return the prediction that suits ``labels`` [N] or [N, K] best without looking, for :meth:`baseline`."""
        raise NotImplementedError(f"{type(self).__name__} needs constant, or a baseline of its own")


def build_kind(task: Task) -> Kind:
    """Return the kind of ``task``.

    Raises:
        UsageError: there is no such kind, it is of no trusted package or no :class:`Kind`, or it refuses the task.
    """
    name = task.kind
    if "." not in name:
        known = sorted(info.name for info in pkgutil.iter_modules(kinds.__path__) if info.name != "base")
        if name not in known:
            raise UsageError(f"task.kind is {name!r}; allowed: {', '.join(known)}, or package.module.Class")
        members = vars(importlib.import_module(f"{kinds.__name__}.{name}"))
        return next(value for key, value in members.items() if key.lower() == name)(task)
    return find_class(task.kind, Kind, "task.kind")(task)
