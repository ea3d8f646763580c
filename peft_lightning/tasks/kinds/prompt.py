"""A text or a pair of texts inside a template, and a word of the vocabulary for each label.

The label is the word that the backbone's own head for masked language modelling likes best at the mask, among the
label words (LM-BFF, https://arxiv.org/abs/2012.15723, sections 4 and 6):

    p(y | x) = softmax over the label words of (MLM head)(h at the mask)

A score between two bounds is a mixture of two words, ``y = low + (high - low) p(second word)``, learned with the
cross-entropy between the mixtures (LM-BFF's released code takes a KL divergence of probabilities for logarithms there,
issue 45 of princeton-nlp/LM-BFF). The head is frozen (``layers/word_head.py``).

With demonstrations, a filled-in example for each label follows the text: [CLS] text [SEP] example [SEP] example [SEP].
In training a text has one set, always the same (LM-BFF draws a new one each time); else it is read with several sets,
and the scores are averaged. What is too long shortens the text, from the end of its longer part; template, mask
and examples are never cut.

Shapes: B rows, N sequences (all sets of all rows), L tokens, C label words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.functional.sequences import sum_by_row
from peft_lightning.layers.word_head import WordHead
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.demonstrations import Demonstrations
from peft_lightning.tasks.kinds.base import Kind, Model
from peft_lightning.tasks.kinds.classify import Classify
from peft_lightning.tasks.kinds.regress import Regress
from peft_lightning.tasks.losses import float32, no_weights
from peft_lightning.tasks.rows import whole_number
from peft_lightning.tasks.table import Task
from peft_lightning.tasks.templates import Filler, Template, word_numbers

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt"]

_SHOWN = ("none", "random", "similar")
_PER_TOKEN = ("input_ids", "token_mask", "token_type_ids")


class Prompt(Kind):
    """Softmax over label words at a mask.

    Options:
        template: what stands around the texts and the mask; see ``tasks/prompts.py``.
        words: the word of each label of ``task.labels``, as a mapping or in their order; with ``bounds``, the words of
            the lowest and of the highest number.
        bounds: the lowest and the highest number, for a task without labels.
        demonstrate: none, random or similar: whether examples are shown, and which.
        shots: rows to show, with the columns of the task; a few-shot data module gives its own.
        sets: of examples that a text is read with, outside of training.
        longest_example: shots that take more tokens with their template are not shown; 0 shows all.
        id: a column that is handed on to the answers.

    Raises:
        UsageError: an option or a field of the task has a value that is not allowed.
    """

    options = {
        "template": "",
        "words": (),
        "bounds": (),
        "demonstrate": "none",
        "shots": (),
        "sets": 16,
        "longest_example": 0,
        "id": "",
    }
    per_token = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._bounds = self._limits(self.settings["bounds"])
        plain = dataclasses.replace(task, options={})
        self._as: Kind = Regress(plain) if self._bounds else Classify(plain)
        self.words = self._label_words(self.settings["words"])
        self.template = Template(self.settings["template"], len(task.text))
        if self.settings["demonstrate"] not in _SHOWN:
            given = self.settings["demonstrate"]
            raise UsageError(f"task.options.demonstrate is {given!r}; allowed: {', '.join(_SHOWN)}")
        self._sets = whole_number(self.settings["sets"]) or 0
        if self._sets < 1:
            raise UsageError(f"task.options.sets is {self.settings['sets']!r}; allowed: a whole number, at least 1")
        longest = whole_number(self.settings["longest_example"])
        if longest is None or longest < 0:
            given = self.settings["longest_example"]
            raise UsageError(f"task.options.longest_example is {given!r}; allowed: a whole number, at least 0")
        self._longest = longest
        if not isinstance(self.settings["id"], str):
            raise UsageError(f"task.options.id is {self.settings['id']!r}; allowed: the name of a column")

    @staticmethod
    def _limits(bounds: Any) -> tuple[float, float] | None:
        numbers = isinstance(bounds, list | tuple) and all(type(value) in (int, float) for value in bounds)
        if numbers and not bounds:
            return None
        if not numbers or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise UsageError(f"task.options.bounds is {bounds!r}; allowed: two numbers, the lower one first")
        return float(bounds[0]), float(bounds[1])

    def _label_words(self, words: Any) -> tuple[str, ...]:
        labels = ("the lowest", "the highest") if self._bounds else self.task.labels
        if isinstance(words, Mapping) and set(words) == set(labels):
            words = [words[label] for label in labels]
        whole = isinstance(words, list | tuple) and all(isinstance(word, str) and word.strip() for word in words)
        if not whole or len(words) != len(labels):
            raise UsageError(f"task.options.words is {words!r}; allowed: a text for each of {', '.join(labels)}")
        return tuple(word.strip() for word in words)

    @property
    def trivial(self) -> str:  # type: ignore[override]
        """What the answers of :meth:`baseline` are called."""
        return self._as.trivial

    # -- what is encoded

    def target(self, value: Any) -> Any:
        """Return the number of the class ``value``, or the number itself."""
        number = self._as.target(value)
        if self._bounds and isinstance(number, float) and not self._bounds[0] <= number <= self._bounds[1]:
            raise DataError(f"the label is {value!r}; allowed: {self._bounds[0]} to {self._bounds[1]}")
        return number

    def classes(self, target: Any = None) -> tuple[str, ...]:
        """Return the name of the class ``target``, or all names; none where labels are numbers."""
        return self._as.classes(target)

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode prompts.

        Returns:
            Beside the usual columns ``token_mask``: 1 for the token that is the mask to read, else 0. With
            demonstrations, ``sizes``; a row has several sequences unless it is labelled and without references, as in
            training.
        """
        texts = list(zip(*(self.texts(rows, column, first_row) for column in self.task.text), strict=True))
        filler = Filler(self.template, tokenizer)
        training = labelled and not references
        shown = self._examples(texts, filler, word_numbers(tokenizer, self.words), 1 if training else self._sets)
        columns: dict[str, list[Any]] = {name: [] for name in _PER_TOKEN}
        sizes = []
        for number, slots in enumerate(filler.slots(texts), first_row):
            try:
                sequences = [filler.sequence(slots, examples, max_length) for examples in next(shown)]
            except DataError as error:
                raise DataError(f"row {number}: {error}") from None
            for values, parts in zip(columns.values(), zip(*sequences, strict=True), strict=True):
                values.append(list(chain.from_iterable(parts)))
            sizes.append([len(tokens) for tokens, *_ in sequences])
        found: dict[str, Sequence[Any]] = {**columns}
        if "token_type_ids" not in tokenizer.model_input_names:
            del found["token_type_ids"]
        if self.settings["demonstrate"] != "none":
            found["sizes"] = sizes
        if labelled:
            found["labels"] = self.targets_of(rows, first_row)
        if references and self.settings["id"]:
            found["reference"] = self.records({"id": rows[self.settings["id"]]})
        return found

    def _examples(
        self, texts: Sequence[Sequence[str]], filler: Filler, words: Sequence[int], count: int
    ) -> Iterator[list[list[list[int]]]]:
        """Yield for each row its sets of examples, as tokens."""
        if self.settings["demonstrate"] == "none":
            alone: list[list[list[int]]] = [[]]
            yield from (alone for _ in texts)
            return
        shots = self.settings["shots"]
        if not isinstance(shots, list | tuple) or not shots or not all(isinstance(shot, Mapping) for shot in shots):
            allowed = "rows to show, which FewShotDataModule gives"
            raise UsageError(f"task.options.shots is {shots!r:.40}; allowed with demonstrations: {allowed}")
        columns = {name: [shot.get(name) for shot in shots] for name in (*self.task.text, self.task.label)}
        given = list(zip(*(self.texts(columns, name, 0) for name in self.task.text), strict=True))
        labels = [self._word_of(target) for target in self.targets_of(columns, 0)]
        filled = [
            filler.filled(slots, words[label])[0] for slots, label in zip(filler.slots(given), labels, strict=True)
        ]
        fits = [number for number, tokens in enumerate(filled) if not self._longest or len(tokens) <= self._longest]
        demonstrations = Demonstrations(
            [" ".join(given[number]) for number in fits],
            [labels[number] for number in fits],
            self.words,
            similar=self.settings["demonstrate"] == "similar",
        )
        for row in texts:
            yield [[filled[fits[shot]] for shot in chosen] for chosen in demonstrations.sets(" ".join(row), count)]

    def _word_of(self, target: Any) -> int:
        """Number of the word that an example shows; of a score, that of the nearer bound."""
        return int(target > sum(self._bounds) / 2) if self._bounds else int(target)

    # -- what is computed

    @property
    def num_outputs(self) -> int:
        """Number of label words."""
        return len(self.words)

    def head(self, backbone: nn.Module, style: str, dropout: float) -> nn.Module:
        """Return the backbone's own head for the label words; style and dropout are those of other heads."""
        return WordHead(backbone, word_numbers(load_tokenizer(self.tokenizer_name), self.words))

    def outputs(self, scores: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the words' scores at the mask, [B, C] in float32 at least; the mean over a row's sequences."""
        places_N = inputs["token_mask"].argmax(1)
        scores_NC = float32(scores)[torch.arange(len(places_N), device=scores.device), places_N]
        counts_B = inputs.get("sequences")
        return scores_NC if counts_B is None else sum_by_row(scores_NC, inputs) / counts_B.unsqueeze(1)

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy over the label words, and the weight of the label's class, or 1."""
        if self._bounds is None:
            return self._as.losses(outputs, batch, class_weights)
        no_weights(class_weights, "prompt with bounds")
        low, high = self._bounds
        share_B = (batch["labels"].to(outputs) - low) / (high - low)
        mixture_BC = torch.stack([1 - share_B, share_B], 1)
        losses_B = -(mixture_BC * outputs.log_softmax(-1)).sum(1)
        return losses_B, torch.ones_like(losses_B)

    # -- what is predicted

    def _plain(self, outputs: Tensor) -> Tensor:
        """What a kind without a prompt would have for outputs: the scores [B, C], or a number [B, 1]."""
        if self._bounds is None:
            return outputs
        low, high = self._bounds
        return low + (high - low) * outputs.softmax(-1)[:, 1:]

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> Any:
        """Return the likeliest class, int64 [B], or the number, float32 [B]."""
        return self._as.predictions(self._plain(outputs), batch, model)

    def metrics(self) -> MetricCollection:
        """Return fresh metrics under the names that the task gives."""
        return self._as.metrics()

    def constant(self, labels: Tensor) -> Tensor:
        """Return the most frequent class, or the mean."""
        return self._as.constant(labels)

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"label", "probabilities"}`` or ``{"score"}`` per row, and its id if it has one."""
        named = batch.get("references", [{}] * len(outputs))
        unnamed = {name: value for name, value in batch.items() if name != "references"}
        answers = self._as.answers(self._plain(outputs), unnamed, model)
        return [{**name, **answer} for name, answer in zip(named, answers, strict=True)]
