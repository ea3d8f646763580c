"""Scores of tagged sentences, against seqeval on everything at once, and against a slow reading of tags."""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval import metrics as seqeval
from torch.multiprocessing.spawn import start_processes

from peft_lightning.errors import UsageError
from peft_lightning.tasks.entities import build_entity_metrics, entities_of
from tests.reference import tags as oracle

TYPES = ["PER", "LOC", "A-B"]
NAMES = ["f1", "precision", "recall", "accuracy", "f1_PER", "f1_LOC"]
# Any tag may follow any other: I- after O, or after another type.
TAG = st.sampled_from(["O", "O", *(f"{part}-{name}" for part in "BI" for name in TYPES)])
PAIRS = st.lists(st.lists(st.tuples(TAG, TAG), max_size=8), max_size=12)


def computed(names: Sequence[str], parts: Sequence[Sequence[Sequence[tuple[str, str]]]]) -> dict[str, float]:
    """The metrics after one update per part; a part is sentences of (predicted, true)."""
    metrics = build_entity_metrics(names, TYPES)
    for part in parts:
        metrics.update([[one for one, _ in words] for words in part], [[two for _, two in words] for words in part])
    return {name: value.item() for name, value in metrics.compute().items()}


def expected(pairs: Sequence[Sequence[tuple[str, str]]]) -> dict[str, float]:
    found = [[one for one, _ in words] for words in pairs]
    true = [[two for _, two in words] for words in pairs]
    if not any(true):  # which seqeval refuses
        return dict.fromkeys(NAMES, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a score is undefined it is 0
        values = {
            "f1": seqeval.f1_score(true, found),
            "precision": seqeval.precision_score(true, found),
            "recall": seqeval.recall_score(true, found),
            "accuracy": seqeval.accuracy_score(true, found),
        }
        report = seqeval.classification_report(true, found, output_dict=True)
    return {**values, **{f"f1_{name}": report.get(name, {}).get("f1-score", 0.0) for name in ("PER", "LOC")}}


@given(pairs=PAIRS, size=st.integers(1, 5))
def test_batches_give_what_seqeval_gives_on_everything(pairs: list[Any], size: int) -> None:
    parts = [[], *(pairs[start : start + size] for start in range(0, len(pairs), size)), []]
    assert computed(NAMES, parts) == pytest.approx(expected(pairs), abs=1e-6)


@given(sentences=st.lists(st.lists(TAG, max_size=10), max_size=5))
def test_entities_equal_the_slow_reading(sentences: list[list[str]]) -> None:
    begin, whole = 0, set()
    for tags in sentences:
        assert set(entities_of([tags])) == oracle.entities(tags)
        whole |= {(name, first + begin, last + begin) for name, first, last in oracle.entities(tags)}
        begin += len(tags) + 1
    assert set(entities_of(sentences)) == whole


def test_broken_tags_begin_entities() -> None:
    assert entities_of([["O", "I-PER", "I-PER", "I-LOC", "B-LOC"]]) == [("PER", 1, 2), ("LOC", 3, 3), ("LOC", 4, 4)]
    assert entities_of([["B-PER"], ["I-PER"]]) == [("PER", 0, 0), ("PER", 2, 2)]


def test_an_entity_counts_only_whole_and_of_its_type() -> None:
    true = ["B-PER", "I-PER", "O", "B-LOC"]
    for found, matching in ((true, 2), (["B-PER", "B-PER", "O", "B-LOC"], 1), (["B-PER", "I-PER", "O", "B-PER"], 1)):
        values = computed(["precision", "recall"], [[list(zip(found, true, strict=True))]])
        assert values == pytest.approx({"precision": matching / len(entities_of([found])), "recall": matching / 2})


def test_reset_forgets() -> None:
    metrics = build_entity_metrics(["f1", "accuracy"], TYPES)
    metrics.update([["B-PER"]], [["B-LOC"]])
    metrics.reset()
    metrics.update([["B-PER"]], [["B-PER"]])
    assert {name: value.item() for name, value in metrics.compute().items()} == {"f1": 1.0, "accuracy": 1.0}


def test_sentences_of_another_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        build_entity_metrics(["accuracy"], TYPES).update([["O"]], [["O", "O"]])


RANKS = ([["B-PER", "O"], ["I-LOC"], ["B-PER"]], [["B-PER", "I-PER"], ["B-LOC"], ["O"]])


def _rank(rank: int, store: str, results: str) -> None:
    """One of two ranks: it holds three sentences or none."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metrics = build_entity_metrics(NAMES, TYPES)
    if rank == 0:
        metrics.update(*RANKS)
    torch.save(metrics.compute(), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_of_different_size_agree_with_one_process(tmp_path: Path) -> None:
    folder = str(tmp_path)
    start_processes(_rank, (f"{folder}/store", folder), nprocs=2, start_method="fork")
    one = expected([list(zip(*tags, strict=True)) for tags in zip(*RANKS, strict=True)])
    assert one["f1"] == pytest.approx(0.4)
    for rank in (0, 1):
        values = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {name: value.item() for name, value in values.items()} == pytest.approx(one, abs=1e-6)


def test_unknown_name() -> None:
    allowed = "f1, precision, recall, accuracy, f1_PER, f1_LOC, f1_A-B"
    with pytest.raises(UsageError, match=f"task.metrics has 'f1_ORG'; allowed for tags: {allowed}"):
        build_entity_metrics(["f1", "f1_ORG"], TYPES)


def test_without_seqeval_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("seqeval"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"seqeval, which is not installed: pip install 'peft_lightning\[tasks\]'"):
        build_entity_metrics(["f1"], TYPES)
