"""SQuAD's metrics against an oracle and against torchmetrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.text import squad

from peft_lightning.errors import UsageError
from peft_lightning.tasks.squad import build_span_metrics
from tests.reference import squad as oracle

NAMES = ("exact_match", "f1", "has_answer_f1", "no_answer_accuracy")
PIECES = [
    "a",
    "an",
    "the",
    "The",
    "cat",
    "Cat's",
    "dog",
    "é",
    "A.",
    ",",
    "-",
    "–",
    " ",
    "  ",
    "\t",
    "\n",
    "_",
    "1",
    "ﬀ",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
PAIRS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=6)
PAIRS_2 = st.lists(st.tuples(TEXT | st.just(""), st.lists(TEXT, max_size=3)), min_size=1, max_size=6)


def values(pairs: list[tuple[str, list[str]]], version: int, cut: int = 0) -> dict[str, float]:
    metrics = build_span_metrics(NAMES[: 2 * version], unanswerable=version == 2)
    for part in (pairs[:cut], pairs[cut:]):
        metrics.update([found for found, _ in part], [golds for _, golds in part])
    return {name: value.item() for name, value in metrics.compute().items()}


@given(pairs=PAIRS, cut=st.integers(0, 6))
def test_version_1(pairs: list[tuple[str, list[str]]], cut: int) -> None:
    expected = oracle.evaluate([found for found, _ in pairs], [golds for _, golds in pairs], 1)
    assert values(pairs, 1, cut) == pytest.approx(expected, abs=1e-7)


@given(pairs=PAIRS_2, cut=st.integers(0, 6))
def test_version_2(pairs: list[tuple[str, list[str]]], cut: int) -> None:
    expected = oracle.evaluate([found for found, _ in pairs], [golds for _, golds in pairs], 2)
    assert values(pairs, 2, cut) == pytest.approx(expected, abs=1e-7)


@given(pairs=PAIRS)
def test_torchmetrics_agrees(pairs: list[tuple[str, list[str]]]) -> None:
    # Its F1 is that of version 2.0, but it drops no gold answer without words.
    pairs = [(found, golds) for found, golds in pairs if all(map(oracle.words, golds))] or [("a cat", ["cat"])]
    preds = [{"prediction_text": found, "id": str(number)} for number, (found, _) in enumerate(pairs)]
    target: list[dict[str, Any]] = [
        {"answers": {"text": golds, "answer_start": [0] * len(golds)}, "id": str(number)}
        for number, (_, golds) in enumerate(pairs)
    ]
    theirs = {name: value.item() / 100 for name, value in squad(preds, target).items()}
    ours = values(pairs, 2)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5)


def test_by_hand() -> None:
    pairs = [("The cat's tail!", ["cats tail", "dog"]), ("a red red cat", ["red cat"]), ("cat", ["dog"])]
    assert values(pairs, 1) == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 0.8) / 3})
    assert values([("x–the–y", ["x– –y"])], 1) == {"exact_match": 1.0, "f1": 1.0}  # a space takes the article's place
    pairs_2 = [("", []), ("the", []), ("cat", []), ("", ["cat"]), ("red cat", ["cat"]), ("", ["the"])]
    assert values(pairs_2, 2) == pytest.approx(
        {"exact_match": 3 / 6, "f1": (3 + 2 / 3) / 6, "has_answer_f1": (1 + 2 / 3) / 3, "no_answer_accuracy": 2 / 3}
    )


def test_no_words_differ_between_the_versions() -> None:
    assert values([("the", ["a"])], 1) == {"exact_match": 1.0, "f1": 0.0}
    assert values([("the", ["a"])], 2) == {"exact_match": 1.0, "f1": 1.0, "has_answer_f1": 1.0, "no_answer_accuracy": 0}


def test_no_update_is_zero_and_the_states_are_sums() -> None:
    metrics = build_span_metrics(("f1",), unanswerable=False)
    assert metrics.compute() == {"f1": torch.tensor(0.0)}
    metrics.update([], [])
    metrics.update(["red cat"], [["cat"]])
    assert metrics.compute()["f1"].item() == pytest.approx(2 / 3)
    states = metrics["f1"].metric_state.values()
    assert all(isinstance(state, Tensor) and not state.is_floating_point() for state in states)


@pytest.mark.parametrize(
    ("unanswerable", "name", "message"),
    [
        (False, "no_answer_accuracy", r"allowed for questions that have an answer: exact_match, f1$"),
        (
            True,
            "accuracy",
            r"task.metrics has 'accuracy'; allowed for questions that may have no answer: exact_match, f1",
        ),
    ],
)
def test_unknown_names(unanswerable: bool, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_span_metrics(("f1", name), unanswerable)
