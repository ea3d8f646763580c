"""Which cells share a batch, and how long the rest takes."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from peft_lightning.backbones.sharing import sharing_backbones
from peft_lightning.study.cells import Cell, cells_of
from peft_lightning.study.grid import merged_settings, read_grid
from peft_lightning.study.planning import plan
from peft_lightning.study.progress import Progress
from tests.study.helpers import FULL, SPARSE, folder, grid_of
from tests.toy import tiny


def groups(methods: dict[str, Any], backbone: str, side_by_side: int, **changes: Any) -> list[list[Cell]]:
    cells = cells_of(read_grid(grid_of(backbone, methods, **changes)))
    with sharing_backbones() as shared:
        found = plan(cells, side_by_side, shared)
    assert sorted(id(cell) for group in found for cell in group) == sorted(map(id, cells))
    return found


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return folder(tmp_path / "backbone")


def test_groups_are_alike_balanced_and_of_few_seeds(backbone: str) -> None:
    wide = {"wide": {"adapter": {"bottleneck": 9}}, "sparse": {"prune": {"sparsity": 0.5}}}
    methods = {"a": merged_settings(SPARSE, {"variants": wide}), "b": SPARSE, "full": FULL}
    found = groups(methods, backbone, 4, seeds=[1, 2, 3], lr=[1e-3, 2e-3], tasks=["toy_sentiment", "toy_pairs"])
    for group in found:
        assert len(group) <= 4
        assert len({(cell.task, cell.variant == "wide", cell.method == "full") for cell in group}) == 1
    sizes = {True: [], False: []}  # type: ignore[var-annotated]
    for group in (group for group in found if group[0].task == "toy_sentiment" and group[0].method != "full"):
        sizes[group[0].variant == "wide"].append(len(group))
        assert len({cell.seed for cell in group}) <= 2
    assert sizes == {True: [3, 3], False: [4, 4, 4]}
    assert sum(len(group) == 1 for group in found) == 2 * 3 * 2


@pytest.mark.parametrize(
    "changes", [{"epochs": [1, 2]}, {"epochs": None, "steps": [1, 2]}, {"data": {"shots": [10, 20]}}]
)
def test_other_numbers_of_steps_are_other_groups(backbone: str, changes: dict[str, Any]) -> None:
    assert [len(group) for group in groups({"a": SPARSE}, backbone, 8, **changes)] == [2, 2]


def test_alone_and_what_cannot_be_built(backbone: str) -> None:
    bad = merged_settings(SPARSE, {"init_args": {"adapter": {"kind": "none"}}})
    assert {len(group) for group in groups({"a": SPARSE}, backbone, 1)} == {1}
    assert [len(group) for group in groups({"a": SPARSE, "bad": bad}, backbone, 8)] == [2, 1, 1]


def test_random_backbones_are_shared_by_one_seed_only() -> None:
    values = {**grid_of("", {"a": SPARSE}, lr=[1e-3, 2e-3]), "backbone": tiny(0.0)}
    with sharing_backbones() as shared:
        found = plan(cells_of(read_grid(values)), 8, shared)
    assert [{cell.seed for cell in group} for group in found] == [{13}, {21}]


def test_time_left_is_learned_from_cells_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = cells_of(read_grid(grid_of("x", {"a": SPARSE, "b": SPARSE}, seeds=[1, 2, 3])))
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown = Progress(cells, finished=4)
    by_name = {name: [cell for cell in cells if cell.method == name] for name in "ab"}
    shown.begin(by_name["a"][:2])
    assert shown.time_left() is None
    clock[0] += 10
    shown.tick(0.5)
    assert shown.time_left() == timedelta(seconds=10 + 4 * 10)
    clock[0] += 10
    shown.end(by_name["a"][:2], 1)
    shown.begin(by_name["b"][:1])
    clock[0] += 40
    shown.end(by_name["b"][:1], 0)
    shown.begin(by_name["b"][1:2])
    assert shown.time_left() == timedelta(seconds=40 + 40 + 10)
    shown.tick(0.0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cell 7/10  1 failed  b  toy_sentiment  10 shots  seed 2  lr 0.005  10 epochs")
    assert last.endswith("0:01:30 left")
    shown.end(by_name["b"][1:2], 0)
    for cell in (by_name["b"][2], by_name["a"][2]):
        shown.begin([cell])
        shown.end([cell], 0)
    assert capsys.readouterr().err.splitlines()[-1] == "cell 10/10  1 failed"


def test_time_left_of_two_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = cells_of(read_grid(grid_of("x", {"a": SPARSE}, seeds=[1, 2, 3, 4])))
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    shown = Progress(cells, finished=0, workers=2)
    shown.begin(cells[:1])
    shown.begin(cells[1:2])
    clock[0] += 10
    shown.end(cells[:1], 0)
    # ten seconds a cell: the second is about to end, and each of the two that are left has a worker
    assert shown.time_left() == timedelta(seconds=10)
    shown.begin(cells[2:3])
    assert capsys.readouterr().err.splitlines()[-1].endswith("and 1 beside it  0:00:10 left")
    for cell in cells[1:]:
        if cell is cells[3]:
            shown.begin([cell])
        shown.end([cell], 0)
    assert capsys.readouterr().err.splitlines()[-1] == "cell 4/4"
