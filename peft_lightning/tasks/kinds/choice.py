"""Which one of a few texts goes with a context: multiple choice.

Each choice is read together with the context, as a pair, and the head gives it one score; the row's choices share a
softmax. Rows may have different numbers of choices.

Shapes: B rows, N pairs (all choices of all rows), K choices of the row that has most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.functional.sequences import row_of_sequence
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Kind, Model
from peft_lightning.tasks.losses import float32, no_weights
from peft_lightning.tasks.rows import encode_cut, name_list, second_last, whole_number
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

__all__ = ["Choice"]


class Choice(Kind):
    """Softmax over the choices of a row.

    ``task.text`` is the context; two columns are joined by a space. A pair that is too long loses the end of its
    context, and of the choice only what is longer than ``max_length`` alone.

    A label is the number of the right choice from 0, or in text form its letter from A. Where a row names its
    choices, as ARC does (``{"text": [...], "label": ["1", "2", ...]}``), or the task does, a text is one of these
    names; a whole number counts from 0 all the same.

    Options:
        choices: columns with one choice each (a row with fewer has none in the last ones), or one column that holds
            a list of texts, a mapping of lists called text and label, or a list of mappings with a text and a label.
        blank: what stands for the choice inside the context, as "_" in WinoGrande. The context is then what comes
            before it, and each choice goes on with what comes after it.
        words: by column of ``task.text``, a text to read instead of each value of the column.
        names: how labels in text form call the choices, such as "1" and "2".
        id: a column that is handed on to the answers.

    Raises:
        UsageError: an option or a field of the task has a value that is not allowed.
    """

    options = {"choices": (), "blank": "", "words": {}, "names": (), "id": ""}
    trivial = "most frequent place"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.labels:
            raise UsageError(
                f"task.labels is {list(task.labels)}; allowed for kind choice: none (task.options.names names choices)"
            )
        self._columns = name_list(self.settings, "choices", least=1)
        self._names = name_list(self.settings, "names")
        words = self.settings["words"]
        if not isinstance(words, Mapping) or not all(
            column in task.text and isinstance(texts, Mapping) and all(isinstance(t, str) for t in texts.values())
            for column, texts in words.items()
        ):
            columns = " or ".join(task.text)
            raise UsageError(f"task.options.words is {words!r}; allowed: {columns}: a mapping of values to texts")
        for option in ("blank", "id"):
            if not isinstance(self.settings[option], str):
                raise UsageError(f"task.options.{option} is {self.settings[option]!r}; allowed: a text")

    # -- what is encoded

    def further(self) -> tuple[str, ...]:
        """Return the columns of the choices."""
        return self._columns

    def strings(self) -> tuple[str, ...]:
        """Return the columns of the context and of the choices."""
        return (*super().strings(), *self._columns, *([self.task.label] if self._names else []))

    def required(self) -> tuple[str, ...]:
        """Return the columns of the context and of the first two choices."""
        return (*self.task.text, *self._columns[:2])

    def target(self, value: Any) -> int:
        """Return the number of the choice ``value``, in a row that does not name its choices."""
        return _place(value, self._names)

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode each choice of each row with the row's context; see :meth:`Kind.encode`."""
        contexts = self._contexts(rows, first_row)
        choices, names = self._choices(rows, first_row)
        counts = [len(texts) for texts in choices]
        shown = choices
        if self.settings["blank"]:
            contexts, shown = self._filled(contexts, choices, first_row)
        firsts = list(chain.from_iterable([context] * count for context, count in zip(contexts, counts, strict=True)))
        flat = encode_cut(tokenizer, (firsts, list(chain(*shown))), max_length, second_last)
        columns: dict[str, list[Any]] = {}
        for name, sequences in flat.items():
            parts = iter(sequences)
            by_row = [[next(parts) for _ in range(count)] for count in counts]
            columns[name] = [list(chain.from_iterable(row)) for row in by_row]
            if name == "input_ids":
                columns["sizes"] = [[len(tokens) for tokens in row] for row in by_row]
        if labelled:
            columns["labels"] = self._labels(rows, names, counts, first_row)
        if references:
            ids = {"id": rows[self.settings["id"]]} if self.settings["id"] else {}
            columns["reference"] = self.records({"choices": choices, **ids})
        return {**columns}

    def _contexts(self, rows: Mapping[str, Sequence[Any]], first_row: int) -> list[str]:
        parts = []
        for column in self.task.text:
            texts = self.texts(rows, column, first_row)
            words = self.settings["words"].get(column)
            if words is not None:
                for number, text in enumerate(texts, first_row):
                    if text not in words:
                        raise DataError(f"row {number}, column {column!r}: {text!r}; allowed: {', '.join(words)}")
                texts = [words[text] for text in texts]
            parts.append(texts)
        return [" ".join(texts) for texts in zip(*parts, strict=True)]

    def _choices(
        self, rows: Mapping[str, Sequence[Any]], first_row: int
    ) -> tuple[list[list[str]], list[Sequence[str]]]:
        """Texts of the choices, and their names, of each row."""
        texts: list[list[str]] = []
        names: list[Sequence[str]] = []
        columns = zip(*(rows[column] for column in self._columns), strict=True)
        for number, values in enumerate(columns, first_row):
            given, called = (_present(values), None) if len(self._columns) > 1 else _parts(values[0])
            if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
                where = f"row {number}, column {self._columns[0]!r}"
                if len(self._columns) > 1:
                    where = f"row {number}, columns {', '.join(self._columns)}"
                raise DataError(f"{where}: {given!r} is not a list of texts")
            if len(given) < 2:
                raise DataError(f"row {number} has {len(given)} choice(s); allowed: two or more")
            texts.append(list(given))
            names.append(self._names if called is None else _called(called, len(given), number))
        return texts, names

    def _filled(
        self, contexts: list[str], choices: list[list[str]], first_row: int
    ) -> tuple[list[str], list[list[str]]]:
        blank, befores, texts = self.settings["blank"], [], []
        for number, (context, row) in enumerate(zip(contexts, choices, strict=True), first_row):
            before, *after = context.split(blank)
            if len(after) != 1:
                column = self.task.text[-1]
                raise DataError(f"row {number}, column {column!r}: has {blank!r} {len(after)} times; allowed: once")
            befores.append(before.rstrip())
            texts.append([choice + after[0] for choice in row])
        return befores, texts

    def _labels(
        self, rows: Mapping[str, Sequence[Any]], names: list[Sequence[str]], counts: list[int], first_row: int
    ) -> list[int]:
        labels = []
        for row, value in enumerate(rows[self.task.label]):
            where = f"row {first_row + row}, column {self.task.label!r}"
            try:
                label = _place(value, names[row])
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if label >= counts[row]:
                raise DataError(
                    f"{where}: the label is {value!r}; allowed for {counts[row]} choices: 0 to {counts[row] - 1}"
                )
            labels.append(label)
        return labels

    # -- what is computed

    @property
    def num_outputs(self) -> int:
        """One: the score of a pair."""
        return 1

    def outputs(self, scores: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the scores [N, 1] row by row: [B, K] in float32 at least, -inf where a row has fewer choices."""
        counts_B, rows_N = inputs["sequences"], row_of_sequence(inputs)
        assert rows_N is not None
        places_N = torch.arange(len(rows_N), device=rows_N.device) - (counts_B.cumsum(0) - counts_B)[rows_N]
        scores_N = float32(scores[:, 0])
        outputs_BK = scores_N.new_full((len(counts_B), int(counts_B.max())), -torch.inf)
        return outputs_BK.index_put((rows_N, places_N), scores_N)

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy over the row's choices, and 1."""
        no_weights(class_weights, "choice")
        losses_B = F.cross_entropy(outputs, batch["labels"], reduction="none")
        return losses_B, torch.ones_like(losses_B)

    # -- what is predicted

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Tensor:
        """Return the choice with the largest score, int64 [B]."""
        return outputs.argmax(-1)

    def metrics(self) -> MetricCollection:
        """Return the accuracy.

        Raises:
            UsageError: the task names another metric.
        """
        from peft_lightning.tasks.metrics import collect
        from peft_lightning.tasks.set_metrics import ExactMetric

        return collect(self.task.metrics, {"accuracy": ExactMetric()}, "kind choice")

    def constant(self, labels: Tensor) -> Tensor:
        """Return the most frequent place of the right choice, the first if several are."""
        return torch.bincount(labels).argmax()

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"label": number, "choice": text, "probabilities": [...]}`` per row, and its id if it has one."""
        answers = []
        labels, probabilities = outputs.argmax(-1).tolist(), outputs.float().softmax(-1).tolist()
        for label, row, reference in zip(labels, probabilities, batch["references"], strict=True):
            texts, named = reference["choices"], {name: reference[name] for name in ("id",) if name in reference}
            answers.append({**named, "label": label, "choice": texts[label], "probabilities": row[: len(texts)]})
        return answers


def _present(values: Sequence[Any]) -> Sequence[Any]:
    """``values`` without the last ones that are missing, or empty as such a cell of CSV is."""
    count = max((place for place, value in enumerate(values, 1) if value not in (None, "")), default=0)
    return values[:count]


def _parts(value: Any) -> tuple[Any, Any]:
    """Texts and names of the choices in one cell; the names are None where it has none."""
    if isinstance(value, Mapping):
        return value.get("text"), value.get("label")
    if isinstance(value, list) and value and all(isinstance(choice, Mapping) for choice in value):
        return [choice.get("text") for choice in value], [choice.get("label") for choice in value]
    return value, None


def _called(names: Any, count: int, number: int) -> list[str]:
    """The names of a row's choices, as texts."""
    if not isinstance(names, list | tuple) or len(names) != count:
        found = len(names) if isinstance(names, list | tuple) else repr(names)
        raise DataError(f"row {number} has {count} choices with {found} labels; allowed: as many")
    texts = [str(name) for name in names]
    if len(set(texts)) < count:
        raise DataError(f"row {number} has choices labelled {', '.join(texts)}; allowed: different labels")
    return texts


def _place(value: Any, names: Sequence[str]) -> int:
    """Number of the choice that a label means."""
    if isinstance(value, str):
        text = value.strip()
        if text in names:
            return names.index(text)
        if not names and len(text) < 20 and text.isdecimal():
            return int(text)
        if not names and len(text) == 1 and "A" <= text <= "Z":
            return ord(text) - ord("A")
    elif (number := whole_number(value)) is not None and number >= 0:
        return number
    texts = ", ".join(names) if names else "a letter from A on"
    raise DataError(f"the label is {value!r}; allowed: a number from 0 on, or {texts}")
