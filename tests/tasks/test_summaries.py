"""ROUGE beside a count by hand and beside torchmetrics; first sentences."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torchmetrics.text import ROUGEScore
from torchmetrics.utilities import dim_zero_sum

from peft_lightning.errors import UsageError
from peft_lightning.tasks.summaries import Rouge, build_rouge, first_sentence

WORDS = ("red", "black", "cat", "dog", "bad")  # that stemming leaves alone
NAMES = ("rouge1", "rouge2", "rougeL")


def f_measure(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if common else 0.0


def by_hand(name: str, text: str, reference: str) -> float:
    """One F-measure, of words that have no other form."""
    a, b = text.split(), reference.split()
    if name == "rougeL":

        @cache
        def common(i: int, j: int) -> int:
            if i == len(a) or j == len(b):
                return 0
            return common(i + 1, j + 1) + 1 if a[i] == b[j] else max(common(i + 1, j), common(i, j + 1))

        return f_measure(common(0, 0), len(a), len(b))
    n = int(name[-1])
    one, other = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (a, b))
    return f_measure((one & other).total(), one.total(), other.total())


def rows(count: int) -> tuple[list[str], list[list[str]]]:
    """Texts, and one to three references each; some texts are empty."""
    rng = random.Random(0)

    def text(least: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(least, 9)))

    return [text(0) for _ in range(count)], [[text(1) for _ in range(rng.randrange(1, 4))] for _ in range(count)]


def scores(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    metrics = build_rouge(NAMES)
    metrics.update(predictions, truths)
    return {name: float(value) for name, value in metrics.compute().items()}


def test_counts_by_hand() -> None:
    predictions, truths = rows(40)
    got = scores(predictions, truths)
    assert tuple(got) == NAMES
    for name in NAMES:
        best = [max(by_hand(name, p, t) for t in texts) for p, texts in zip(predictions, truths, strict=True)]
        assert got[name] == pytest.approx(sum(best) / 40, rel=1e-6)
        assert 0.05 < got[name] < 0.7


def test_stems_cases_and_punctuation_do_not_count() -> None:
    assert scores(["The dogs, RUNNING!"], [["the dog running"]]) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert scores(["b a"], [["a b"]]) == {"rouge1": 1, "rouge2": 0, "rougeL": 0.5}


def test_equals_torchmetrics() -> None:
    sentences = [
        "A far-right German politician has been rescued by refugees after he crashed his car.",
        "Two Syrians pulled a German politician out of his car, and he thanked them.",
        "The politician's crashed car was found 3.5 km away; refugees helping him were praised!",
        "Dundee leapfrogged Ross County and moved into the Premiership's top six.",
    ]
    predictions = [*sentences, ""]
    truths = [sentences[::-1][i : i + 2] or sentences[:1] for i in range(5)]
    theirs = ROUGEScore(use_stemmer=True, accumulate="best", rouge_keys=NAMES)
    theirs.update(predictions, truths)
    expected = {name: float(theirs.compute()[f"{name}_fmeasure"]) for name in NAMES}
    assert scores(predictions, truths) == pytest.approx(expected, rel=1e-6)


def test_lines_are_sentences_in_lsum() -> None:
    for text, expected in (("b\na", 1.0), ("b a", 0.5)):
        metric = Rouge("rougeLsum")
        metric.update([text], [["a b"]])
        assert float(metric.compute()) == expected


def test_parts_of_ranks_add_up_exactly() -> None:
    predictions, truths = rows(31)
    for name in NAMES:
        whole, parts = Rouge(name), [Rouge(name) for _ in range(3)]
        whole.update(predictions, truths)
        for part, chosen in zip(parts, (slice(0, 20), slice(20, 31), slice(0, 0)), strict=True):
            part.update(predictions[chosen], truths[chosen])
        total = Rouge(name)
        total.total = torch.stack([part.total for part in parts]).sum()
        total.count = torch.stack([part.count for part in parts]).sum()
        total.update([], [])
        assert_close(total.compute(), whole.compute(), rtol=0, atol=0)
        assert whole._reductions == {"total": dim_zero_sum, "count": dim_zero_sum}
        assert whole.compute().dtype == torch.float32


def test_no_rows_copies_and_resets() -> None:
    metric = Rouge("rouge1")
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert float(metric.compute()) == 0
    metric.update(["a"], [["a"]])
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        other.update(["a"], [["b"]])
        assert float(other.compute()) == 0.5
    metric.reset()
    metric.update(["a"], [["a", "b"]])
    assert float(metric.compute()) == 1


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="task.metrics has 'bleu'; allowed for summaries: rouge1, rouge2, rougeL"):
        build_rouge(["rouge1", "bleu"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UsageError, match=r"needs the package rouge-score: pip install 'peft_lightning\[tasks\]'"):
        build_rouge(["rouge1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith ran. He won.", "Mr. Smith ran."),
        ("  One line \n Another. ", "One line"),
        ("A line that\ngoes on. Yes.", "A line that\ngoes on."),
        ("Wilson et al. (2020) won, i.e. A lost. Yes.", "Wilson et al. (2020) won, i.e. A lost."),
        ('He said "Stop!" They did.', 'He said "Stop!"'),
        ("It costs 3.50 dollars today. No.", "It costs 3.50 dollars today."),
        ("J. R. Hartley? Yes.", "J. R. Hartley?"),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_first_sentence(text: str, expected: Any) -> None:
    assert first_sentence(text) == expected
