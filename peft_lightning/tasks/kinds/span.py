"""The stretch of a passage that answers a question, as in SQuAD 1.1 and 2.0.

A row is a question with all the windows of its passage (``tasks/spans.py``). The head scores every token as the start
and as the end of the answer (https://arxiv.org/abs/1810.04805, section 4.2); the token that stands for no answer is
both where a window does not hold the whole answer. Scores outside of the passage and of this token count as -inf.

Shapes: N windows of a batch's B rows, L tokens of a window, K spans of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lightning.errors import DataError, UsageError
from peft_lightning.functional.sequences import sum_by_row
from peft_lightning.functional.spans import best_spans, from_rows, to_rows
from peft_lightning.tasks.batch import Batch
from peft_lightning.tasks.kinds.base import Kind, Model, Rows
from peft_lightning.tasks.losses import float32, no_weights
from peft_lightning.tasks.spans import Tokens, Windows, frame_of, tokens_of
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection
    from transformers import PreTrainedTokenizerBase

_SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)
_FORM = '{"text": [texts], "answer_start": [the place of each in the context]} (CSV has none: use JSON Lines)'


class Span(Kind):
    """A question and a context; the answer is a stretch of the context.

    The columns of ``task.text`` are the question and the context. The label is ``{"text": [...], "answer_start":
    [...]}``; its first answer is trained on, all of them count in the metrics. Without any, there is no answer.

    Options:
        unanswerable: whether a question may have no answer.
        null_threshold: no answer, where its score is larger than that of the best span by more than this.
        stride: tokens of the context that neighbouring windows share; if null 128, or half of a window's where it is
            shorter.
        max_question: tokens to which a question is cut.
        max_answer: tokens of an answer at most.
        window: tokens of a window, where that is less than ``max_length``; no such limit if 0.
        best: how many spans of a row share the probability in answers.
        id: the column with the name of a question, in answers; none if empty.

    Raises:
        UsageError: the task does not have two texts, names classes, or an option is not allowed.
    """

    options = {
        "unanswerable": False,
        "null_threshold": 0.0,
        "stride": None,
        "max_question": 64,
        "max_answer": 30,
        "window": 0,
        "best": 20,
        "id": "",
    }
    per_token = True
    style = "linear"
    trivial = "no answer, or the first sentence"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if len(task.text) != 2:
            raise UsageError(
                f"task.text is {list(task.text)}; allowed for kind span: two, the question and the context"
            )
        if task.labels:
            raise UsageError(f"task.labels is {list(task.labels)}; allowed for kind span: none")
        least = {"stride": 0, "max_question": 1, "max_answer": 1, "window": 0, "best": 1}
        for name, value in self.settings.items():
            if name in least:
                fits, allowed = type(value) is int and value >= least[name], f"a whole number, {least[name]} or more"
                fits = fits or (name == "stride" and value is None)
            elif name == "id":
                fits, allowed = isinstance(value, str), "the name of a column, or nothing"
            elif name == "unanswerable":
                fits, allowed = isinstance(value, bool), "true or false"
            else:
                fits, allowed = type(value) in (int, float) and math.isfinite(value), "a finite number"
            if not fits:
                raise UsageError(f"task.options.{name} is {value!r}; allowed: {allowed}")

    # -- what is encoded

    @property
    def num_outputs(self) -> int:
        """Two a token: as a start, and as an end."""
        return 2

    def target(self, value: Any) -> list[int]:
        """Return where the first answer begins and ends in the context; an empty list if there is none."""
        answers = _answers_of(value)
        if answers is None:
            raise DataError(f"the answers are {str(value)[:200]}; allowed: {_FORM}")
        if not answers and not self.settings["unanswerable"]:
            raise DataError("there is no answer; allowed: at least one, or task.options.unanswerable: true")
        if not answers:
            return []
        text, start = answers[0]
        start += len(text) - len(text.lstrip())  # without the spaces round it, which only some tokens hold
        return [start, start + len(text.strip())]

    def encode(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labelled: bool,
        references: bool = False,
        first_row: int = 0,
    ) -> dict[str, Sequence[Any]]:
        """Encode each question with all windows of its context; see the base."""
        questions, contexts = (self.texts(rows, column, first_row) for column in self.task.text)
        places: list[Any] = self.targets_of(rows, first_row) if labelled else []
        if labelled:
            self._check_places(rows, contexts, first_row)
        different: dict[str, int] = {}
        asked = np.array([different.setdefault(context, len(different)) for context in contexts])
        frame = frame_of(tokenizer)
        passages = tokens_of(list(different), tokenizer)
        size, stride = self._window(max_length, sum(frame.sizes))
        windows = Windows(
            frame,
            tokens_of([question.lstrip() for question in questions], tokenizer),
            passages,
            asked,
            size=size,
            max_question=self.settings["max_question"],
            stride=stride,
        )
        columns: dict[str, Sequence[Any]] = {**windows.columns(characters=references)}
        if labelled:
            columns["labels"] = self._labels(windows, passages, asked, places)
        if references:
            columns["reference"] = self._references(rows, labelled)
        return columns

    def _window(self, max_length: int, specials: int) -> tuple[int, int]:
        """Tokens of a window, and of them the stride: with a question of full length it must leave one."""
        size, stride = min(max_length, self.settings["window"] or max_length), self.settings["stride"]
        room = size - specials - self.settings["max_question"]
        chosen = min(128, room // 2) if stride is None else stride
        if room < 1:
            raise UsageError(
                f"task.options.max_question is {self.settings['max_question']}; allowed for windows of {size} tokens, "
                f"{specials} special ones among them: at most {size - specials - 1}, or a larger max_length"
            )
        if room <= chosen:
            raise UsageError(
                f"task.options.stride is {stride}; allowed for windows of {size} tokens, {specials} "
                f"special ones and max_question = {self.settings['max_question']} among them: at most {room - 1}"
            )
        return size, chosen

    def _check_places(self, rows: Mapping[str, Sequence[Any]], contexts: Sequence[str], first_row: int) -> None:
        column = self.task.label
        for number, (context, value) in enumerate(zip(contexts, rows[column], strict=True), first_row):
            for text, start in zip(value["text"], value["answer_start"], strict=True):
                if not context.startswith(text, start):
                    raise DataError(
                        f"row {number}, column {column!r}: the answer {text!r} is not at {start} in the context;"
                        " allowed: the place of an answer's first character, counted from 0"
                    )

    @staticmethod
    def _labels(windows: Windows, passages: Tokens, asked: np.ndarray, places: list[Any]) -> Sequence[np.ndarray]:
        starts, ends = np.array([place or [0, 0] for place in places]).T
        return windows.labels(*passages.between(asked, starts, ends))

    def _references(self, rows: Mapping[str, Sequence[Any]], labelled: bool) -> list[str]:
        kept = {"context": rows[self.task.text[1]]}
        if labelled:
            kept["answers"] = [value["text"] for value in rows[self.task.label]]
        if self.settings["id"] in rows:
            kept["id"] = rows[self.settings["id"]]
        return self.records(kept)

    # -- what is computed

    def losses(self, outputs: Tensor, batch: Batch, class_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean of the cross-entropies of start and end, summed over windows, and their number."""
        no_weights(class_weights, "span")
        inputs = batch["inputs"]
        scores_NL2, marks_N3 = float32(outputs), from_rows(inputs["windows"], inputs, 3)
        allowed_NL = _inside(marks_N3, outputs.shape[1])
        allowed_NL = allowed_NL.scatter(1, marks_N3[:, :1], True)
        scores_NL2 = scores_NL2.masked_fill(~allowed_NL.unsqueeze(-1), -torch.inf)
        loss_N2 = F.cross_entropy(scores_NL2, from_rows(batch["labels"], inputs, 2), reduction="none")
        return sum_by_row(loss_N2.mean(1), inputs), inputs["sequences"].to(loss_N2.dtype)

    # -- what is predicted

    def predictions(self, outputs: Tensor, batch: Batch, model: Model) -> list[str]:
        """Return the texts of the answers, empty where there is none."""
        return [answer["answer"] for answer in self._answers(outputs, batch, 1)]

    def truths(self, batch: Batch) -> list[list[str]]:
        """Return the texts of all gold answers."""
        return [reference["answers"] for reference in batch["references"]]

    def metrics(self) -> MetricCollection:
        """Return SQuAD's metrics, in the version that the task is of."""
        from peft_lightning.tasks.squad import build_span_metrics

        return build_span_metrics(self.task.metrics, self.settings["unanswerable"])

    def answers(self, outputs: Tensor, batch: Batch, model: Model) -> list[dict[str, Any]]:
        """Return ``{"id", "answer", "start", "end", "score", "probability"}`` per row.

        ``answer`` is ``context[start:end]``. With ``unanswerable`` there is ``no_answer_score`` too, and where there
        is no answer, ``answer`` is empty and ``start`` and ``end`` are null. ``score`` is that of the best span, null
        where the context has no tokens. The probability is the answer's among ``best`` spans and no answer.
        """
        return self._answers(outputs, batch, self.settings["best"])

    def official(self, answers: list[dict[str, Any]]) -> dict[str, str]:
        """Return the files that SQuAD's scripts read, where questions have names, each its own."""
        from peft_lightning.tasks.squad import squad_files

        return squad_files(answers, self.settings["unanswerable"]) if self.settings["id"] else {}

    def baseline(self, rows: Rows, stage: str) -> Iterator[tuple[Any, Any]]:
        """Yield no answers, where a question may have none, else the first sentences of the contexts; and truths."""
        for batch in rows.batches(stage):
            contexts = ["" if self.settings["unanswerable"] else row["context"] for row in batch["references"]]
            sentences = (_SENTENCE.match(context) for context in contexts)
            yield [m.group() if m else c for m, c in zip(sentences, contexts, strict=True)], self.truths(batch)

    def _answers(self, outputs: Tensor, batch: Batch, count: int) -> list[dict[str, Any]]:
        inputs = batch["inputs"]
        scores_NL2, marks_N3 = float32(outputs), from_rows(inputs["windows"], inputs, 3)
        inside_NL = _inside(marks_N3, outputs.shape[1])
        spans = best_spans(scores_NL2, inside_NL, inputs, self.settings["max_answer"], count)
        start_BK = inputs["token_starts"][spans.windows, spans.first]
        end_BK = inputs["token_ends"][spans.windows, spans.last]
        null_N = scores_NL2[torch.arange(len(scores_NL2), device=scores_NL2.device), marks_N3[:, 0]].sum(-1)
        null_B = to_rows(null_N, inputs, torch.inf).amin(1)
        found = (values.tolist() for values in (spans.scores, start_BK, end_BK, null_B))
        return [self._answer(*row) for row in zip(batch["references"], *found, strict=True)]

    def _answer(
        self, reference: Mapping[str, Any], scores: list[float], starts: list[int], ends: list[int], null: float
    ) -> dict[str, Any]:
        best, context = scores[0], reference["context"]
        name = {"id": reference["id"]} if "id" in reference else {}
        odds = {"no_answer_score": null} if self.settings["unanswerable"] else {}
        if best == -math.inf:
            return {**name, "answer": "", "start": None, "end": None, "score": None, "probability": 1.0, **odds}
        # windows share tokens, so the same span is found in several: the first is the best
        spans: dict[tuple[int, ...], float] = {}
        for score, *place in zip(scores, starts, ends, strict=True):
            spans.setdefault(tuple(place), score)
        text, start, chosen = context[starts[0] : ends[0]], starts[0], best
        start += len(text) - len(text.lstrip())  # some tokens begin with the space before a word
        answer: dict[str, Any] = {"answer": text.strip(), "start": start, "end": start + len(text.strip())}
        if odds and null - best > self.settings["null_threshold"]:
            answer, chosen = {"answer": "", "start": None, "end": None}, null
        rivals = [*spans.values(), *odds.values()]
        probability = 1 / sum(math.exp(min(rival - chosen, 700.0)) for rival in rivals)
        return {**name, **answer, "score": best, "probability": probability, **odds}


def _answers_of(value: Any) -> list[tuple[str, int]] | None:
    """The answers in a label and where they begin; None where it is no label."""
    given = value if isinstance(value, Mapping) else {}
    texts, starts = given.get("text"), given.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return None
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return list(zip(texts, starts, strict=True)) if all(type(s) is int and s >= 0 for s in starts) else None


def _inside(marks_N3: Tensor, length: int) -> Tensor:
    """Whether a token belongs to the passage, bool [N, L]."""
    place_L = torch.arange(length, device=marks_N3.device)
    return (place_L >= marks_N3[:, 1:2]) & (place_L < marks_N3[:, 2:])
