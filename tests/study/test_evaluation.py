"""The trivial answer beside a study's scores, for every kind of task."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_lightning.study.cells import cells_of
from peft_lightning.study.evaluation import majority
from peft_lightning.study.grid import read_grid
from peft_lightning.study.splits import Splits
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import get_task

BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOYS = "sentiment pairs similarity choice groups marked topics tags span copy".split()


@pytest.mark.parametrize("name", TOYS)
def test_every_kind_has_a_trivial_answer(name: str, cache_dir: Path) -> None:
    grid = read_grid(
        {
            "backbone": {"config": {**BERT, "intermediate_size": 16}, "tokenizer": "toy"},
            "data": {"shots": [2], "test_rows": 10},
            "tasks": [f"toy_{name}"],
            "seeds": [1],
            "methods": {"all": {"class_path": "FineTuneModule"}},
        }
    )
    (cell,) = cells_of(grid)
    found = majority(cell.module(), Splits(grid.seeds).data(cell))
    assert set(found) == set(build_kind(get_task(f"toy_{name}")).metrics().keys())
    assert all(-1 <= value <= 1 for value in found.values())
