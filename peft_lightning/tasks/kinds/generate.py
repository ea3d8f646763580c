"""A text that is written for a text: a summary, a headline, a subject line.

The backbone is an encoder-decoder (BART, https://arxiv.org/abs/1910.13461). Its head is the embedding of its own
words (``layers/language_head.py``). In training, the decoder reads the right summary, one token late, and each token's
likelihood is raised; in validation, test and predict it writes by beam search. The defaults of the search are those of
BART's own results on XSum.

Shapes: B rows, T target tokens, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.layers.language_head import LanguageHead, Writer
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Kind, Model, Rows
from peft_lightning.tasks.losses import float32, no_weights
from peft_lightning.tasks.summaries import build_rouge, first_sentence
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

# option -> type, least value
_RANGES: dict[str, tuple[type, float]] = {
    "max_target": (int, 2),
    "min_target": (int, 0),
    "beams": (int, 1),
    "no_repeat_ngram": (int, 0),
    "length_penalty": (float, -10.0),
    "label_smoothing": (float, 0.0),
}


class Generate(Kind):
    """Cross-entropy of the target's tokens; ROUGE of what beam search writes.

    The text column holds a text, or a list of sentences. The label column holds a text, or a list of them: the first
    is the one to learn, and each is a reference. A row's score is that of its closest reference.

    Options of the task: ``max_target``, tokens of a summary at most, in training and in writing, with the end token;
    ``min_target``, tokens at least before the end token in writing; ``beams``, ``length_penalty`` and
    ``no_repeat_ngram`` of the search (see :class:`Writer`); ``label_smoothing`` e, the share of a target's weight that
    is spread over all words; ``targets``, a column with lists of further references; ``id``, a column that answers
    repeat.

    Raises:
        UsageError: the task names classes, or an option has a value that is not allowed.
    """

    options = {
        "max_target": 64,
        "min_target": 0,
        "beams": 6,
        "length_penalty": 1.0,
        "no_repeat_ngram": 3,
        "label_smoothing": 0.0,
        "targets": "",
        "id": "",
    }
    per_token = True
    generates = True
    style = "tied"
    trivial = "first sentence"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.labels:
            raise UsageError(f"task.labels is {list(task.labels)}; allowed for kind {task.kind}: none")
        for option, (kind, least) in _RANGES.items():
            value = self.settings[option]
            right = type(value) in (int, kind) and least <= value < math.inf
            if not right or (option == "label_smoothing" and value >= 1):
                what = "a whole number" if kind is int else "a number"
                most = " and below 1" if option == "label_smoothing" else ""
                raise UsageError(f"task.options.{option} is {value!r}; allowed: {what}, at least {least}{most}")
        if self.settings["min_target"] >= self.settings["max_target"]:
            raise UsageError(
                f"task.options.min_target is {self.settings['min_target']}; allowed: less than max_target, "
                f"{self.settings['max_target']}"
            )
        for option in ("targets", "id"):
            if not isinstance(self.settings[option], str):
                raise UsageError(f"task.options.{option} is {self.settings[option]!r}; allowed: the name of a column")
        self._tokenizers: dict[str, Any] = {}
        self._writer: Writer | None = None
        self._ends_agree = False

    # -- what is encoded

    def target(self, value: Any) -> list[int]:
        """Has no meaning here: only a tokenizer makes numbers of a summary, in :meth:`encode`."""
        raise NotImplementedError("a summary is no number: encode gives its tokens")

    def columns(self, labelled: bool) -> tuple[str, ...]:
        """Return the columns of the text, the label, further references and the row's name."""
        targets = self.settings["targets"] if labelled else ""
        return tuple(dict.fromkeys((*super().columns(labelled), *filter(None, [targets]))))

    def strings(self) -> tuple[str, ...]:
        """Return the columns of the text and of the summary."""
        return (*super().strings(), self.task.label)

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode texts, and as ``labels`` the tokens of summaries, both as the tokenizer writes a text alone.

        References are ``summary``, all that a row's score may compare with, ``first``, the text's first sentence, and
        ``id``.
        """
        columns = super().encode(rows, tokenizer, max_length, False, first_row=first_row)
        parts: dict[str, Sequence[Any]] = {}
        if self.settings["id"] in rows:
            parts["id"] = rows[self.settings["id"]]
        if labelled:
            parts["summary"] = self._summaries(rows, first_row)
            learned = [texts[0] for texts in parts["summary"]]
            most = self.settings["max_target"]
            columns["labels"] = tokenizer(learned, truncation=True, max_length=most)["input_ids"]
            parts["first"] = [first_sentence(text) for text in self.texts(rows, self.task.text[0], first_row)]
        if references and parts:
            columns["reference"] = self.records(parts)
        return columns

    @staticmethod
    def texts(rows: Mapping[str, Sequence[Any]], column: str, first_row: int) -> list[str]:
        """Return a column of texts; a list of sentences is joined.

        Raises:
            DataError: a value is neither.
        """
        joined = [" ".join(value) if _are_texts(value) else value for value in rows[column]]
        return Kind.texts({column: joined}, column, first_row)

    def _summaries(self, rows: Mapping[str, Sequence[Any]], first_row: int) -> list[list[str]]:
        """All references of each row, the one to learn first."""
        found = []
        for number, value in enumerate(rows[self.task.label], first_row):
            texts = [value] if isinstance(value, str) else value
            if not _are_texts(texts) or not texts:
                where = f"row {number}, column {self.task.label!r}"
                raise DataError(f"{where}: {value!r:.80} is no summary; allowed: a text, or a list of one text or more")
            found.append(list(texts))
        column = self.settings["targets"]
        for number, more in enumerate(rows[column] if column else ()):
            if not _are_texts(more):
                where = f"row {first_row + number}, column {column!r}"
                raise DataError(f"{where}: {more!r:.80} are no references; allowed: a list of texts")
            found[number] += [text for text in more if text not in found[number]]
        return found

    # -- what is computed

    @property
    def num_outputs(self) -> int:
        """One text. What the head gives for a token are as many logits as the backbone has words."""
        return 1

    def head(self, backbone: nn.Module, style: str, dropout: float) -> nn.Module:
        """Return the head that reads words off the backbone's own embedding; it has no dropout, as BART's has none.

        Raises:
            UsageError: the backbone cannot write, or has no positions for the longest summary.
        """
        config: Any = backbone.config
        if style != self.style:
            raise UsageError(
                f"head is {style!r}; allowed for kind {self.task.kind}: auto, the backbone's own embedding"
            )
        head = LanguageHead(backbone)
        longest, positions = self.settings["max_target"], config.max_position_embeddings
        if longest > positions:
            raise UsageError(f"task.options.max_target is {longest}; allowed with this backbone: at most {positions}")
        return head

    def inputs(self, batch: Batch, config: Any) -> Mapping[str, Tensor]:
        """Return the batch's inputs, and ``decoder_input_ids`` [B, T]: the labels, one token late.

        Padding at their end needs no mask: no token before it sees it, and none after it counts.

        Raises:
            UsageError: the labels do not end with the token that the backbone stops at.
        """
        labels_BT = batch["labels"]
        if not self._ends_agree:  # once, since it waits for the device
            last_B1 = labels_BT.gather(1, (labels_BT != -100).sum(1, keepdim=True) - 1)
            self._check_ends(config, set(last_B1.flatten().tolist()))
        start_B1 = labels_BT.new_full((len(labels_BT), 1), config.decoder_start_token_id)
        late_BT = torch.cat([start_B1, labels_BT[:, :-1]], dim=1)
        return {**batch["inputs"], "decoder_input_ids": late_BT.masked_fill(late_BT == -100, config.pad_token_id)}

    def _check_ends(self, config: Any, found: set[int]) -> None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if wrong := sorted(found - set(ends)):
            raise UsageError(
                f"backbone: stops writing at token {ends[0]}, but summaries end with token {wrong[0]}; "
                "backbone.tokenizer or backbone.config.eos_token_id belongs to another model"
            )
        self._ends_agree = True

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropies of a row's tokens, and their number."""
        no_weights(class_weights, self.task.kind)
        labels_BT = batch["labels"]
        logits_NV = float32(outputs.flatten(0, 1))
        smoothing = float(self.settings["label_smoothing"])
        losses_N = F.cross_entropy(logits_NV, labels_BT.flatten(), reduction="none", label_smoothing=smoothing)
        return losses_N.view_as(labels_BT).sum(1), (labels_BT != -100).sum(1).to(losses_N.dtype)

    # -- what is predicted

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> list[str]:
        """Return the text that beam search writes for each row; ``outputs`` are not looked at."""
        tokenizer = self._tokenizer_of(model)
        if self._writer is None or (self._writer.backbone, self._writer.head) != (model.backbone, model.head):
            self._writer = Writer(model.backbone, model.head)
        tokens = self._writer(
            batch["inputs"],
            longest=self.settings["max_target"],
            shortest=self.settings["min_target"],
            **{name: self.settings[name] for name in ("beams", "length_penalty", "no_repeat_ngram")},
        )
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _tokenizer_of(self, model: Model) -> Any:
        name = model.tokenizer_name
        if name not in self._tokenizers:
            tokenizer = load_tokenizer(name)
            config: Any = model.backbone.config
            self._check_ends(config, {tokenizer("the")["input_ids"][-1]})
            self._tokenizers = {name: tokenizer}
        return self._tokenizers[name]

    def truths(self, batch: Batch) -> list[list[str]]:
        """Return the references of each row."""
        return [reference["summary"] for reference in batch["references"]]

    def metrics(self) -> MetricCollection:
        """Return kinds of ROUGE."""
        return build_rouge(self.task.metrics)

    def baseline(self, rows: Rows, stage: str) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Yield the first sentence of each text, and the references."""
        for batch in rows.batches(stage):
            yield [reference["first"] for reference in batch["references"]], self.truths(batch)

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"summary": text}`` per row, with its ``id`` where the task names one."""
        texts = self.predictions(outputs, batch, model)
        known = batch.get("references", [{}] * len(texts))
        names = [{"id": row["id"]} if "id" in row else {} for row in known]
        return [{**name, "summary": text} for name, text in zip(names, texts, strict=True)]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
