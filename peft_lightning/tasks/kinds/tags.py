"""A tag for each word of a sentence, as in named entity recognition.

The head reads every token. As in BERT's own experiments (https://arxiv.org/abs/1810.04805, 5.3) the first sub-word of
a word stands for the word; loss and predictions leave out the others. Words that the tokenizer drops, and those
behind ``max_length``, get the tag O, and count in the scores.

Shapes: B rows, L tokens, C tags, T tokens of all rows end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from peft_lightning.backbones.tokenizers import needs_spaces
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.entities import build_entity_metrics, entities_of
from peft_lightning.tasks.kinds.base import Kind, Model, Rows
from peft_lightning.tasks.losses import float32, weights_for
from peft_lightning.tasks.rows import whole_number
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tags"]

_OUTSIDE, _IGNORED = "O", -100


class Tags(Kind):
    """Softmax over the tags of ``task.labels`` for each word.

    The text is a column with lists of words, or with texts that have spaces between the words (CSV knows no lists);
    the label is a column with as many tags in one of these forms, each as a name or as a number.

    Options:
        id: a column that is handed on to the answers.
        scheme: how the data tags entities. IOB2: each begins with B-TYPE. IOB1: it begins with I-TYPE unless an
            entity of its type ends right before it, as in CoNLL-2003's own files; such tags become IOB2, which is what
            is learned and answered.

    Raises:
        UsageError: an option or a field of the task has a value that is not allowed.
    """

    options = {"id": "", "scheme": "IOB2"}
    per_token = True
    style = "linear"
    trivial = "most frequent tag of each word"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if len(task.text) != 1:
            raise UsageError(f"task.text is {list(task.text)}; allowed for kind {task.kind}: one column, of words")
        begins = {name for name in task.labels if name[:2] == "B-" and name[2:]}
        if not begins or {*task.labels} - begins - {f"I{name[1:]}" for name in begins} != {_OUTSIDE}:
            raise UsageError(
                f"task.labels is {list(task.labels)}; allowed for kind {task.kind}: O, B-TYPE for each type of entity,"
                " and I-TYPE where they may have several words"
            )
        if self.settings["scheme"] not in ("IOB2", "IOB1"):
            raise UsageError(f"task.options.scheme is {self.settings['scheme']!r}; allowed: IOB2, IOB1")
        if not isinstance(self.settings["id"], str):
            raise UsageError(f"task.options.id is {self.settings['id']!r}; allowed: the name of a column")
        self._numbers = {name: number for number, name in enumerate(task.labels)}
        self._outside = self._numbers[_OUTSIDE]

    @property
    def num_outputs(self) -> int:
        """Number of tags."""
        return len(self.task.labels)

    # -- what is encoded

    def target(self, value: Any) -> list[int]:
        """Return the numbers of a sentence's tags."""
        tags = _items(value)
        if tags is None:
            raise DataError(f"{value!r:.80} is no list of tags")
        numbers = [self._number(tag) for tag in tags]
        return self._begun(numbers) if self.settings["scheme"] == "IOB1" else numbers

    def classes(self, target: Any = None) -> tuple[str, ...]:
        """Return the types of a sentence's entities, or all types."""
        names = self.task.labels if target is None else [self.task.labels[number] for number in target]
        return tuple(dict.fromkeys(name[2:] for name in names if name != _OUTSIDE))

    def _number(self, tag: Any) -> int:
        if isinstance(tag, str) and (tag in self._numbers or (len(tag) < 20 and tag.isdecimal())):
            tag = self._numbers[tag] if tag in self._numbers else int(tag)
        number = whole_number(tag)
        if number is not None and 0 <= number < self.num_outputs:
            return number
        names = ", ".join(self._numbers)
        raise DataError(f"the tag is {tag!r}; allowed: 0 to {self.num_outputs - 1}, or one of {names}")

    def _begun(self, numbers: list[int]) -> list[int]:
        """Turn IOB1 into IOB2: I-TYPE becomes B-TYPE where what stands before it is of no or of another type."""
        pairs = pairwise([_OUTSIDE, *(self.task.labels[number] for number in numbers)])
        begins = [name[0] == "I" and name[1:] != before[1:] for before, name in pairs]
        changed = {number: self._numbers.get(f"B{name[1:]}", number) for name, number in self._numbers.items()}
        return [changed[number] if begin else number for number, begin in zip(numbers, begins, strict=True)]

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode sentences.

        Returns:
            Beside the usual columns ``token_words``: the number of the word, from 1, that a token is the first
            sub-word of; the negative number for its other sub-words; 0 for tokens of no word. ``labels`` has one
            number a token, -100 but for first sub-words. References hold ``tokens``, ``tags`` and ``id``.
        """
        sentences = self._sentences(rows, first_row)
        # At the left, the rest of a word that is cut would stand for the word.
        if (side := getattr(tokenizer, "truncation_side", "right")) != "right":
            raise UsageError(f"tokenizer cuts at the {side}; allowed for kind tags: at the right")
        words = [[f" {word}" for word in words] for words in sentences] if needs_spaces(tokenizer) else sentences
        encoded: Any = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=max_length, return_attention_mask=False
        )
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        lengths = np.array([len(tokens) for tokens in columns["input_ids"]])
        words_T = self._word_numbers([encoding.word_ids for encoding in encoded.encodings], lengths)
        columns["token_words"] = _per_row(words_T, lengths)
        tags: list[list[int]] = self._tags(rows, sentences, first_row) if labelled else []
        if labelled:
            starts = words_T > 0
            counts = np.array([len(words) for words in sentences])
            places = np.repeat(np.cumsum(counts) - counts, lengths)[starts] + words_T[starts] - 1
            labels_T = np.full(len(words_T), _IGNORED)
            labels_T[starts] = np.concatenate([np.array(part) for part in tags])[places]
            columns["labels"] = _per_row(labels_T, lengths)
        if references:
            known = {"tokens": sentences, "id": rows.get(self.settings["id"]), "tags": tags}
            columns["reference"] = self.records({name: values for name, values in known.items() if values})
        return columns

    def _sentences(self, rows: Mapping[str, Sequence[Any]], first_row: int) -> list[list[str]]:
        """Return each row's words."""
        column = self.task.text[0]
        sentences = []
        for number, value in enumerate(rows[column], first_row):
            words = _items(value)
            if words is None or not all(isinstance(word, str) for word in words):
                raise DataError(f"row {number}, column {column!r}: {value!r:.80} is no list of words")
            if not words:
                raise DataError(f"row {number}, column {column!r}: has no words; allowed: at least one")
            sentences.append(words)
        return sentences

    def _tags(
        self, rows: Mapping[str, Sequence[Any]], sentences: Sequence[Sequence[str]], first_row: int
    ) -> list[list[int]]:
        """Return each row's tags, one a word."""
        tags: Any = self.targets_of(rows, first_row)
        for number, (part, words) in enumerate(zip(tags, sentences, strict=True), first_row):
            if len(part) != len(words):
                where = f"row {number}, column {self.task.label!r}"
                raise DataError(f"{where}: {len(part)} tags for {len(words)} words; allowed: one tag a word")
        found: list[list[int]] = tags
        return found

    @staticmethod
    def _word_numbers(words: Iterable[Sequence[int | None]], lengths: np.ndarray) -> np.ndarray:
        """Return ``token_words`` of all rows end to end, int64 [T], of what the tokenizer says."""
        # None becomes NaN when numpy reads a list as floats, which spares a loop over tokens.
        numbers_T = np.concatenate([np.array(row, np.float64) for row in words])
        words_T = np.nan_to_num(numbers_T + 1).astype(np.int64)
        before_T = np.concatenate([[0], words_T[:-1]])
        before_T[(np.cumsum(lengths) - lengths)[lengths > 0]] = 0
        return np.where(words_T == before_T, -words_T, words_T)

    # -- what is computed

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropies of a row's words, and of the weights of their tags."""
        labels_BL = batch["labels"]
        outputs_BLC = float32(outputs)
        weights_C = weights_for(outputs_BLC, class_weights)
        # As one list of tokens: the loss of a [B, C, L] has no deterministic kernel on CUDA.
        flat = outputs_BLC.flatten(0, 1), labels_BL.flatten(), weights_C
        losses_BL = F.cross_entropy(*flat, ignore_index=_IGNORED, reduction="none").view_as(labels_BL)
        weights_BL = weights_C[labels_BL.clamp_min(0)] * (labels_BL != _IGNORED)
        return losses_BL.sum(1), weights_BL.sum(1)

    # -- what is predicted

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> list[list[str]]:
        """Return the tags of each row's words, those of lost words too."""
        words_BL = batch["inputs"]["token_words"]
        tags = outputs.argmax(-1)[words_BL > 0]
        return self._spread(tags.cpu().numpy(), words_BL.cpu().numpy(), batch["references"])

    def _spread(
        self, tags: np.ndarray, words_BL: np.ndarray, references: Sequence[Mapping[str, Any]]
    ) -> list[list[str]]:
        """Return the names of tags, given for the first sub-words that there are, at their words' places."""
        counts_B = np.array([len(row["tokens"]) for row in references])
        begins_B = np.cumsum(counts_B) - counts_B
        rows, tokens = np.nonzero(words_BL > 0)
        numbers = np.full(counts_B.sum(), self._outside)
        numbers[begins_B[rows] + words_BL[rows, tokens] - 1] = tags
        return _per_row(np.array(self.task.labels)[numbers], counts_B)

    def truths(self, batch: Batch) -> list[list[str]]:
        """Return the tags of each row's words."""
        return [[self.task.labels[number] for number in row["tags"]] for row in batch["references"]]

    def metrics(self) -> MetricCollection:
        """Return fresh metrics under the names that the task gives: see ``tasks/entities.py``."""
        types = dict.fromkeys(name[2:] for name in self.task.labels if name != _OUTSIDE)
        return build_entity_metrics(self.task.metrics, list(types))

    def baseline(self, rows: Rows, stage: str) -> Iterator[tuple[Any, Any]]:
        """Yield the tag that each word mostly has in training (the first of several), and O for words unknown there.

        A word is what the tokenizer makes of it: words of the same sub-words are one.
        """
        counts: Counter[tuple[bytes, int]] = Counter()
        for batch in rows.batches("train"):
            words, words_BL = _subwords(batch["inputs"])
            counts.update(zip(words, batch["labels"].numpy()[words_BL > 0].tolist(), strict=True))
        best: dict[bytes, tuple[int, int]] = {}
        for (word, tag), count in counts.items():
            best[word] = max(best.get(word, (0, 0)), (count, -tag))
        for batch in rows.batches(stage):
            words, words_BL = _subwords(batch["inputs"])
            tags = [-best.get(word, (0, -self._outside))[1] for word in words]
            yield self._spread(np.array(tags, np.int64), words_BL, batch["references"]), self.truths(batch)

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"tokens": [...], "tags": [...], "entities": [...]}`` per row, with its ``id`` where it has one.

        An entity is ``{"type", "start", "end", "text"}``; it ends before the word with the number ``end``.
        """
        answers = []
        for row, tags in zip(batch["references"], self.predictions(outputs, batch, model), strict=True):
            words = row["tokens"]
            entities = [
                {"type": name, "start": first, "end": last + 1, "text": " ".join(words[first : last + 1])}
                for name, first, last in entities_of([tags])
            ]
            named = {"id": row["id"]} if "id" in row else {}
            answers.append({**named, "tokens": words, "tags": tags, "entities": entities})
        return answers

    def official(self, answers: list[dict[str, Any]]) -> dict[str, str]:
        """Return ``predictions.conll``: a line of word and tag per word, an empty line after each sentence.

        A space inside a word becomes an underline, and so does a word of nothing, since spaces end the word there.
        """
        lines = []
        for answer in answers:
            lines += [
                f"{'_'.join(w.split()) or '_'} {tag}\n" for w, tag in zip(answer["tokens"], answer["tags"], strict=True)
            ]
            lines.append("\n")
        return {"predictions.conll": "".join(lines)}


def _items(value: Any) -> list[Any] | None:
    """Return a row's words or tags, or None where it is no list of them."""
    if isinstance(value, str):
        return value.split()
    return list(value) if isinstance(value, list | tuple | np.ndarray) else None


def _per_row(values: np.ndarray, lengths: np.ndarray) -> list[list[Any]]:
    """Return values that lie end to end as a list a row."""
    flat, ends = values.tolist(), [0, *np.cumsum(lengths).tolist()]
    return [flat[start:end] for start, end in pairwise(ends)]


def _subwords(inputs: Mapping[str, Tensor]) -> tuple[list[bytes], np.ndarray]:
    """Return the sub-words of each word that there is, row by row, and ``token_words`` [B, L]."""
    words_BL, ids_BL = inputs["token_words"].numpy(), inputs["input_ids"].numpy()
    ids, starts = ids_BL[words_BL != 0], np.flatnonzero(words_BL[words_BL != 0] > 0).tolist()
    return [ids[start:end].tobytes() for start, end in pairwise([*starts, len(ids)])], words_BL
