"""The metrics of SQuAD, equal to its official scripts for versions 1.1 and 2.0, as shares instead of percent.

An answer and a gold answer are compared as words: in lower case, without ASCII punctuation, without the articles a, an
and the. Exact match: the words are the same. F1: ``2 n / (p + g)`` for n words in common (with repetition) of p and g.
The best gold answer counts. The versions differ where no words are left: F1 is 0 in 1.1; in 2.0 two texts without words
are equal, gold answers without words are dropped, and a question without gold answers has the empty one.

Sources: https://arxiv.org/abs/1606.05250, https://arxiv.org/abs/1806.03822.
"""

from __future__ import annotations

import json
import logging
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torchmetrics import MetricCollection

from peft_lightning.tasks.metrics import MeanScore, collect

__all__ = ["SpanMetric", "build_span_metrics", "squad_files"]

_log = logging.getLogger(__name__)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _exact_match(found: tuple[str, ...], gold: tuple[str, ...]) -> float:
    return float(found == gold)


def _f1(found: tuple[str, ...], gold: tuple[str, ...]) -> float:
    common = (Counter(found) & Counter(gold)).total()
    return 2 * common / (len(found) + len(gold)) if common else 0.0


class SpanMetric(MeanScore):
    """Mean over questions of an answer's score against the best gold answer; 0 for no question.

    Args:
        score: of two lists of words.
        unanswerable: whether to score as version 2.0 does.
        answered: only questions that have (true) or do not have (false) gold answers; all of them if null.
    """

    unit = 2**32

    def __init__(
        self,
        score: Callable[[tuple[str, ...], tuple[str, ...]], float],
        unanswerable: bool,
        answered: bool | None = None,
    ) -> None:
        super().__init__()
        self.score, self.unanswerable, self.answered = score, unanswerable, answered

    def update(self, predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> None:
        """Score ``predictions``, B answers, against B lists of gold answers."""
        scores = [
            self._best(prediction, texts)
            for prediction, texts in zip(predictions, golds, strict=True)
            if self.answered in (None, bool(texts))
        ]
        self.total += sum(round(score * self.unit) for score in scores)
        self.count += len(scores)

    def _best(self, prediction: str, texts: Sequence[str]) -> float:
        found, golds = _words(prediction), [_words(text) for text in texts]
        if self.unanswerable:
            golds = [gold for gold in golds if gold] or [()]
            if not found:
                return float(() in golds)
        return max((self.score(found, gold) for gold in golds), default=0.0)


def build_span_metrics(names: Sequence[str], unanswerable: bool) -> MetricCollection:
    """Return the metrics ``names``; ``update`` takes B answers and B lists of gold answers.

    With ``unanswerable``, ``has_answer_f1`` and ``no_answer_accuracy`` are the parts of F1 over questions that have an
    answer and over those that have none.

    Raises:
        UsageError: a name is unknown.
    """
    metrics = {"exact_match": SpanMetric(_exact_match, unanswerable), "f1": SpanMetric(_f1, unanswerable)}
    if unanswerable:
        metrics["has_answer_f1"] = SpanMetric(_f1, unanswerable, answered=True)
        metrics["no_answer_accuracy"] = SpanMetric(_exact_match, unanswerable, answered=False)
    return collect(names, metrics, f"questions that {'may have no' if unanswerable else 'have an'} answer")


def squad_files(answers: Sequence[Mapping[str, Any]], unanswerable: bool) -> dict[str, str]:
    """Return ``predictions.json``, and ``na_prob.json`` of version 2.0, as the official scripts read them.

    Nothing, and a warning, where not every answer has an ``id`` of its own.
    """
    names = [answer.get("id") for answer in answers]
    if not all(isinstance(name, str | int) for name in names) or len(set(names)) < len(names):
        _log.warning("no predictions.json for SQuAD's script: not every question has an id of its own")
        return {}
    tables = {"predictions.json": {answer["id"]: answer["answer"] for answer in answers}}
    if unanswerable:
        tables["na_prob.json"] = {answer["id"]: _no_answer(answer) for answer in answers}
    return {name: json.dumps(table, indent=1) for name, table in tables.items()}


def _no_answer(answer: Mapping[str, Any]) -> float:
    """The probability of no answer, of the two: no answer and the best span."""
    if answer["score"] is None:
        return 1.0
    return 0.5 + 0.5 * math.tanh((answer["no_answer_score"] - answer["score"]) / 2)
