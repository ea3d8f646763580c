"""Scores of tagged sentences: entities found, as seqeval counts them (https://github.com/chakki-works/seqeval).

With t entities in the truth, p predicted and m that match in type, first and last word:
``precision = m / p``, ``recall = m / t``, ``f1 = 2 m / (t + p)``, each 0 where it is undefined; ``accuracy`` is the
share of words with the right tag. Counts of t, p and m add up over batches and ranks, so the scores do not depend on
how sentences are shared out.

seqeval's default reading is that of CoNLL's own script: ``I-X`` that goes on from nothing, or from another type,
begins an entity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from peft_lightning.errors import UsageError
from peft_lightning.tasks.metrics import MeanScore, collect

__all__ = ["EntityMetric", "TagAccuracy", "build_entity_metrics", "entities_of"]


def entities_of(sentences: Sequence[Sequence[str]]) -> list[tuple[str, int, int]]:
    """Return the type and the numbers of the first and the last word of each entity.

    Args:
        sentences: the tags of each; words are counted through, with one more between two sentences.

    Raises:
        UsageError: seqeval is not there.
    """
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError as error:
        raise UsageError(
            "tags are scored by the package seqeval, which is not installed: pip install 'peft_lightning[tasks]'"
        ) from error
    entities: list[tuple[str, int, int]] = get_entities([list(tags) for tags in sentences])
    return entities


class EntityMetric(Metric):
    """A function of how many entities there are, are predicted, and match.

    Args:
        function: from (t, p, m), float64 each, to a score.
        types: of entities; those of others are not counted.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], types: Sequence[str]) -> None:
        super().__init__()
        self.function, self.types = function, frozenset(types)
        self.add_state("counts", torch.zeros(3, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]) -> None:
        """Count the entities of sentences, given as a tag per word."""
        found, true = ({one for one in entities_of(tags) if one[0] in self.types} for tags in (predictions, truths))
        self.counts += torch.tensor([len(true), len(found), len(true & found)], device=self.counts.device)

    def compute(self) -> Tensor:
        """Return a scalar in float32."""
        # MPS has no float64.
        return self.function(*self.counts.cpu().double()).nan_to_num(0.0).float().to(self.device)


class TagAccuracy(MeanScore):
    """The share of words whose tag is right."""

    def update(self, predictions: Sequence[Sequence[str]], truths: Sequence[Sequence[str]]) -> None:
        """Compare sentences, given as a tag per word, word by word."""
        words = (pair for tags in zip(predictions, truths, strict=True) for pair in zip(*tags, strict=True))
        right = [found == true for found, true in words]
        self.total += sum(right)
        self.count += len(right)


def _f1(true: Tensor, found: Tensor, matching: Tensor) -> Tensor:
    return 2 * matching / (true + found)


def _precision(true: Tensor, found: Tensor, matching: Tensor) -> Tensor:
    return matching / found


def _recall(true: Tensor, found: Tensor, matching: Tensor) -> Tensor:
    return matching / true


_SCORES = {"f1": _f1, "precision": _precision, "recall": _recall}


def build_entity_metrics(names: Sequence[str], types: Sequence[str]) -> MetricCollection:
    """Return the metrics ``names``: f1, precision and recall of all entities, accuracy of tags, or f1_TYPE of a type.

    ``update`` takes the predicted and the true sentences, each a list of tags.

    Raises:
        UsageError: a name is unknown, or seqeval is not there.
    """
    entities_of([])  # what is missing is said before the training, not after it
    known: dict[str, Metric] = {name: EntityMetric(function, types) for name, function in _SCORES.items()}
    known["accuracy"] = TagAccuracy()
    return collect(names, known | {f"f1_{name}": EntityMetric(_f1, [name]) for name in types}, "tags")
