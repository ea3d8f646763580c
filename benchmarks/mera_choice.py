"""What is chosen for MerA's tables on splits that no table shows, and what of the reported ones goes into their files.

Rates are chosen by the mean accuracy on dev shots over tasks, splits and arms of a family, of equals the one with the
lower mean loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.mera_arms import Plan
from benchmarks.mera_cells import Cell
from peft_lightning.errors import DataError
from peft_lightning.study.selection import choose

__all__ = ["choose_rates", "table_cells"]

_Row = Mapping[str, Any]


def choose_rates(plan: Plan, cells: Iterable[_Row]) -> dict[str, float]:
    """Return family -> learning rate, for all arms of the plan.

    Args:
        plan: says which rates there are.
        cells: of a study of the held splits.

    Raises:
        DataError: a family with several rates has no cell.
    """
    families = {arm.name: arm.family for arm in plan.arms}
    known = [cell for cell in cells if cell["cell"]["method"] in families]
    # the single adapter's sources are further splits here
    renamed = [_renamed(cell, method=families[cell["cell"]["method"]], variant="") for cell in known]
    chosen = {cell["cell"]["method"]: cell["cell"]["lr"] for cell in choose(renamed, per=["method"])}
    alone = {arm.family: plan.rates[arm.method][0] for arm in plan.run if len(plan.rates[arm.method]) == 1}
    if missing := [arm.family for arm in plan.run if arm.family not in chosen | alone]:
        raise DataError(f"{missing[0]}: has no cell on held splits")
    return chosen | alone


def _renamed(cell: _Row, **fields: str) -> _Row:
    return {**cell, "cell": {**cell["cell"], **fields}}


def table_cells(cells: Iterable[_Row]) -> tuple[list[Cell], dict[str, list[int]]]:
    """Return what a table keeps of a study's cells, and task -> truths.

    Raises:
        DataError: two cells of a task were tested on other rows.
    """
    kept, truths = [], dict[str, list[int]]()
    for cell in cells:
        key, found = cell["cell"], [int(value) for value in cell["truths"]]
        if truths.setdefault(key["task"], found) != found:
            raise DataError(f"{key['method']} on {key['task']}, seed {key['seed']}: was tested on other rows")
        kept.append(
            Cell(
                arm=key["method"],
                task=key["task"],
                shots=key["shots"],
                seed=key["seed"],
                setting={name: key[name] for name in ("variant", "lr", "epochs") if name in key},
                dev={name: round(float(value), 5) for name, value in cell["dev"].items()},
                predictions=[int(value) for value in cell["predictions"]],
                seconds=round(float(cell["seconds"]), 2),
                steps=int(cell["steps"]),
                trained=int(cell["trained_parameters"]),
            )
        )
    return sorted(kept, key=lambda cell: (cell.task, cell.shots, cell.arm, cell.seed)), truths
