"""The metrics, against slow oracles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.spawn import start_processes
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.tasks.metrics import build_metrics
from tests.reference import scores

CLASSES: dict[str, Callable[..., float]] = {
    "accuracy": scores.accuracy,
    "f1": lambda p, t: scores.f1(p, t, positive=1),
    "macro_f1": scores.macro_f1,
    "mcc": scores.mcc,
}
NUMBERS: dict[str, Callable[..., float]] = {"pearson": scores.pearson, "spearman": scores.spearman}


def computed(names: Sequence[str], outputs: int, parts: Sequence[Sequence[Any]], dtype: torch.dtype) -> Any:
    """The metrics after one update per part, each a list of (prediction, label)."""
    metrics = build_metrics(names, outputs)
    for part in parts:
        table = torch.tensor(part, dtype=dtype).reshape(-1, 2)
        metrics.update(table[:, 0], table[:, 1])
    return {name: value.item() for name, value in metrics.compute().items()}


def cut(pairs: list[Any], size: int) -> list[list[Any]]:
    """``pairs`` in parts of ``size``, and an empty part at either end."""
    return [[], *(pairs[start : start + size] for start in range(0, len(pairs), size)), []]


@pytest.mark.parametrize("outputs", [2, 3])
@given(data=st.data())
def test_class_metrics_equal_the_oracle(outputs: int, data: st.DataObject) -> None:
    number = st.integers(0, outputs - 1)
    pairs = data.draw(st.lists(st.tuples(number, number), max_size=30))
    names = [name for name in CLASSES if outputs == 2 or name != "f1"]
    values = computed(names, outputs, cut(pairs, data.draw(st.integers(1, 7))), torch.long)
    expected = {name: CLASSES[name]([p for p, _ in pairs], [t for _, t in pairs]) for name in names}
    assert values == pytest.approx(expected, abs=1e-6)


@given(pairs=st.lists(st.tuples(st.integers(-20, 20), st.integers(-3, 3)), max_size=30), size=st.integers(1, 7))
def test_number_metrics_equal_the_oracle(pairs: list[tuple[int, int]], size: int) -> None:
    values = computed(list(NUMBERS), 1, cut(pairs, size), torch.float32)
    expected = {name: oracle([p for p, _ in pairs], [t for _, t in pairs]) for name, oracle in NUMBERS.items()}
    assert values == pytest.approx(expected, abs=1e-6)


def test_constant_predictor_scores_nothing() -> None:
    assert computed(["mcc", "f1"], 2, [[(0, 1), (0, 0), (0, 1)]], torch.long) == {"mcc": 0.0, "f1": 0.0}
    assert computed(["pearson"], 1, [[(1.0, 1.0), (1.0, 2.0)]], torch.float32) == {"pearson": 0.0}


def test_reset_forgets() -> None:
    metrics = build_metrics(["spearman"], 1)
    metrics.update(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    metrics.reset()
    metrics.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert_close(metrics.compute(), {"spearman": torch.tensor(1.0)})


def _rank(rank: int, store: str, results: str) -> None:
    """One of two ranks: it holds three examples or none; the first one writes what both computed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(0, 3) if rank == 0 else slice(3, 3)
    predictions, labels = torch.tensor([1, 0, 1])[mine], torch.tensor([1, 1, 0])[mine]
    classes, numbers = build_metrics(["accuracy", "mcc"], 2), build_metrics(["pearson", "spearman"], 1)
    classes.update(predictions, labels)
    numbers.update(predictions.float() + torch.arange(3)[mine], labels.float())
    torch.save({**classes.compute(), **numbers.compute()}, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_of_different_size_agree_with_one_process(tmp_path: Path) -> None:
    folder = str(tmp_path)
    # Forked, since a fresh interpreter would import torch again: six seconds of this test.
    start_processes(_rank, (f"{folder}/store", folder), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = {
        "accuracy": 1 / 3,
        "mcc": -0.5,
        "pearson": scores.pearson([1, 1, 3], [1, 1, 0]),
        "spearman": scores.spearman([1, 1, 3], [1, 1, 0]),
    }
    assert_close(first, second, rtol=0, atol=0)
    assert {name: value.item() for name, value in first.items()} == pytest.approx(expected, abs=1e-6)
    assert math.isclose(expected["pearson"], -1.0)


@pytest.mark.parametrize(
    ("names", "outputs", "message"),
    [
        (["acc"], 2, "task.metrics has 'acc'; allowed for 2 classes: accuracy, f1, macro_f1, mcc"),
        (["f1"], 3, "task.metrics has 'f1'; allowed for 3 classes: accuracy, macro_f1, mcc"),
        (["pearson"], 2, "task.metrics has 'pearson'; allowed for 2 classes"),
        (["pearson", "mcc"], 1, "task.metrics has 'mcc'; allowed for a regression: pearson, spearman"),
    ],
)
def test_names_that_are_not_allowed(names: list[str], outputs: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_metrics(names, outputs)
