"""Answers that are right or wrong each, several to a question: MultiRC.

Every answer is a row and is classified on its own; the question that it belongs to matters to the metric ``em`` only.

Source: MultiRC, https://aclanthology.org/N18-1023; its metrics as in SuperGLUE, https://arxiv.org/abs/1905.00537.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Rows
from peft_lightning.tasks.kinds.classify import Classify
from peft_lightning.tasks.rows import encode_cut, name_list, second_last
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection
    from transformers import PreTrainedTokenizerBase

__all__ = ["Grouped"]

_HALF = 31


class Grouped(Classify):
    """Softmax over the classes of each answer; metrics also by question.

    The first column of ``task.text`` is the passage; the second one and those of ``joined`` are joined by spaces to
    the other text of a pair. A pair that is too long loses the end of its passage, and of the other text only what
    is longer than ``max_length`` alone.

    Metrics: ``f1a``, the F1 of class 1 over all answers; ``em``, the share of questions whose answers are all right;
    and those of a classification.

    Options:
        group: columns that together name the question.
        joined: columns that follow the second text.
        id: a column that is handed on to the answers; so are the columns of the group.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    options = {"group": (), "joined": (), "id": ""}
    trivial = "one class, always"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._group = name_list(self.settings, "group", least=1)
        self._joined = name_list(self.settings, "joined")
        self._ids = (*self._group, *([self.settings["id"]] if self.settings["id"] else []))

    def further(self) -> tuple[str, ...]:
        """Return the columns of the texts that are joined, and of the group."""
        return (*self._joined, *self._group)

    def strings(self) -> tuple[str, ...]:
        """Return the columns of all texts."""
        return (*super().strings(), *self._joined)

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode each answer with its question and passage, and ``group``, the question's number."""
        first, *others = (self.texts(rows, column, first_row) for column in (*self.task.text, *self._joined))
        texts = [first, [" ".join(parts) for parts in zip(*others, strict=True)]] if others else [first]
        columns: dict[str, Sequence[Any]] = {**encode_cut(tokenizer, texts, max_length, second_last)}
        ids = {name: rows[name] for name in self._ids}
        questions = zip(*(ids[name] for name in self._group), strict=True)
        columns["group"] = [_key(question, number) for number, question in enumerate(questions, first_row)]
        if labelled:
            columns["labels"] = self.targets_of(rows, first_row)
        if references:
            columns["reference"] = self.records(ids)
        return columns

    def truths(self, batch: Batch) -> Tensor:
        """Return label and question of each answer, int64 [B, 2]."""
        return torch.stack([batch["labels"], batch["inputs"]["group"]], 1)

    def metrics(self) -> MetricCollection:
        """Return fresh metrics under the names that the task gives.

        Raises:
            UsageError: a name is not allowed for this task.
        """
        from torchmetrics import MetricCollection

        from peft_lightning.tasks.metrics import ConfusionMetric, build_metrics
        from peft_lightning.tasks.set_metrics import AnswerMetric, GroupMetric

        metrics: dict[str, Metric | MetricCollection] = {}
        for name in self.task.metrics:
            if name == "em":
                metrics[name] = GroupMetric()
                continue
            known = "f1" if name == "f1a" and self.num_outputs == 2 else name
            try:
                (ordinary,) = build_metrics([known], self.num_outputs).values()
            except UsageError as error:
                own = "em, f1a" if self.num_outputs == 2 else "em"
                raise UsageError(f"{error}, {own}") from None
            assert isinstance(ordinary, ConfusionMetric)
            metrics[name] = AnswerMetric(ordinary.function, self.num_outputs)
        return MetricCollection(metrics, compute_groups=False)

    def constant(self, labels: Tensor) -> Tensor:
        """Return class 1 where its F1 comes first, which is what suits that best, else the most frequent class."""
        if self.task.metrics[0] in ("f1", "f1a"):
            return labels.new_tensor(1)
        return super().constant(labels)

    def baseline(self, rows: Rows, stage: str) -> Iterator[tuple[Any, Any]]:
        """Yield the constant that suits the training rows best, and truths."""
        constant = self.constant(rows.labels("train"))
        for batch in rows.batches(stage):
            truths = self.truths(batch)
            yield constant.expand(len(truths)).contiguous(), truths


def _key(values: tuple[Any, ...], number: int) -> int:
    """A whole number of 63 bits for a question: equal where ``values`` are equal, and only there.

    One or two whole numbers below 2**31 are packed. Other values are hashed to 62 bits, with which two of a million
    questions share a number once in nine million times.

    Raises:
        DataError: a value is missing.
    """
    if any(value is None for value in values):
        raise DataError(f"row {number} belongs to no question: {values!r}; allowed: numbers or texts")
    numbers = [int(value) for value in values if isinstance(value, Integral)]
    if len(numbers) == len(values) <= 2 and all(0 <= number < 1 << _HALF for number in numbers):
        return sum(number << _HALF * place for place, number in enumerate(reversed(numbers)))
    digest = hashlib.blake2b(json.dumps(values, default=str).encode(), digest_size=8).digest()
    return 1 << 2 * _HALF | int.from_bytes(digest) >> 2
