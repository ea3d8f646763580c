"""How close written summaries come to those of people, and the trivial summary.

ROUGE (Lin, 2004, https://aclanthology.org/W04-1013/) compares words: ``rouge1`` and ``rouge2`` count common words and
pairs of words, ``rougeL`` the longest common subsequence. The counting is that of rouge-score 0.1.2 with stemming, as
published results on XSum have it; a value is the F-measure, between 0 and 1, averaged over the rows.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from torchmetrics import MetricCollection

from peft_lightning.errors import UsageError
from peft_lightning.tasks.metrics import MeanScore, collect

__all__ = ["Rouge", "build_rouge", "first_sentence"]

_MEASURES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(MeanScore):
    """Mean F-measure of one kind of ROUGE; of several references of a row, the closest counts.

    Args:
        measure: rouge1, rouge2, rougeL, or rougeLsum, which takes the lines of a text for its sentences.
    """

    unit = 2**32

    def __init__(self, measure: str) -> None:
        super().__init__()
        self.measure = measure
        self._scorer: Any = None

    def update(self, predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> None:
        """Add rows: a text each, and one reference or more."""
        for prediction, references in zip(predictions, truths, strict=True):
            self.total += round(self._score(prediction, references) * self.unit)
        self.count += len(predictions)

    def _score(self, prediction: str, references: Sequence[str]) -> float:
        if self._scorer is None:
            from rouge_score.rouge_scorer import RougeScorer

            self._scorer = RougeScorer([self.measure], use_stemmer=True)
        return float(self._scorer.score_multi(references, prediction)[self.measure].fmeasure)


def build_rouge(names: Sequence[str]) -> MetricCollection:
    """Return the metrics ``names``; ``update`` takes a text a row, and a list of references a row.

    Raises:
        UsageError: a name is unknown, or the package that counts is not installed.
    """
    metrics = collect(names, {name: Rouge(name) for name in _MEASURES}, "summaries")
    if importlib.util.find_spec("rouge_score") is None:
        raise UsageError(
            f"task.metrics has {names[0]!r}, which needs the package rouge-score: pip install 'peft_lightning[tasks]'"
        )
    return metrics


# A full stop, and what closes a quotation, before a new sentence, but not after a title, an initial and the like; or
# the end of a line, where the next one does not go on in the middle of a sentence.
_END = re.compile(
    r"""(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bProf)(?<!\b[A-Z])(?<!\bal)(?<!\bi\.e)(?<!\be\.g)
    [.!?]+["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9])
    | (?=\s*\n\s*[^a-z\s])""",
    re.VERBOSE,
)


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, or its first line if that is shorter.

    >>> first_sentence("Mr. Smith ran. He won.")
    'Mr. Smith ran.'
    """
    text = text.strip()
    end = _END.search(text)
    return text[: end.end()] if end else text
