"""From a plan to its file of cells: sources, the choice on held splits, and the splits that are reported.

Everything is done once: sources lie in a folder named after all that decides them, and a study takes up its own cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.mera_arms import PLANS, Arm, Plan
from benchmarks.mera_backbone import PRETRAINED, model_of
from benchmarks.mera_cells import Cell, Results
from benchmarks.mera_choice import choose_rates, table_cells
from benchmarks.mera_grids import grid
from benchmarks.mera_sources import SOURCES, train_missing
from peft_lightning.errors import UsageError
from peft_lightning.study.grid import read_grid
from peft_lightning.study.records import RunRecord
from peft_lightning.study.runner import run_study
from peft_lightning.study.selection import choose

__all__ = ["run_plan"]

_Cells = list[dict[str, Any]]


def run_plan(
    name: str,
    plan: Plan,
    scratch: Path,
    environment: dict[str, Any],
    say: Console,
    *,
    kept: Path | None = None,
    workers: int = 1,
    given: str | None = None,
    tiny: bool = False,
) -> Results:
    """Do what is not done yet of a plan, and return what its tables are made of.

    Args:
        name: of the plan.
        plan: what is compared.
        scratch: folder of models, sources and cells.
        environment: of the records.
        say: where to say how it goes.
        kept: folder of the sources of the pretrained encoder; None: beside the cells, as for other backbones.
        workers: processes that share out cells and threads.
        given: folder or hub name of a backbone that takes the plan's place.
        tiny: toy data and backbone.
    """
    model = model_of(plan.backbone, scratch, environment, say, given=given, tiny=tiny)
    chooser = _chooser(plan, tiny)
    needed = dict.fromkeys([*plan.sources(), *chooser.sources()])
    beside = kept if kept and plan.backbone != PRETRAINED else scratch / "sources"
    sources = train_missing(needed, beside, model, environment, say, tiny)
    few_words = given is None and plan.backbone == PRETRAINED
    folders = {source: folder for source, (folder, _) in sources.items()}
    common: dict[str, Any] = {"folders": folders, "model": model, "few_words": few_words}
    common |= {"workers": workers, "tiny": tiny}
    home = scratch / f"table-{name}"
    held = _held(chooser, scratch / f"table-{plan.rates_of or name}", common)
    rates = {family: rate for family, rate in choose_rates(chooser, held).items() if family in plan.families}
    say.print(f"chosen on held splits: {rates}")
    found: _Cells = []
    for part, arms in _parts(plan):
        values = grid(
            plan,
            arms,
            seeds=plan.seeds,
            rates={arm.name: (rates[arm.family],) for arm in arms},
            singles={task: _singles(arms, task) for task in plan.tasks},
            report=True,
            fewest=not arms[0].main,
            **common,
        )
        found += _cells(values, home / f"report-{part}")
    failed = [
        f"{cell['cell']['method']} on {cell['cell']['task']}: {cell['error']}" for cell in found if "error" in cell
    ]
    if failed:
        say.print(f"{len(failed)} cells failed; the first: {failed[0]}")
    # the single adapter has a cell for each source: the dev shots of a split choose
    cells, truths = table_cells(choose(found))
    held = [] if plan.rates_of else held  # they are counted where they were run
    seconds = sum(cell["seconds"] for cell in [*held, *found])
    facts = {
        "rates": rates,
        "singles": _counts(cells, [arm.name for arm in plan.run if arm.preset == "single"]),
        "workers": workers,
        "minutes": round(seconds / 60 / workers, 1),
        "held_minutes": round(sum(cell["seconds"] for cell in held) / 60 / workers, 1),
        "held_cells": len(held),
        "failed": failed,
        "sources": {source: _facts(source, sources[source][1]) for source in plan.sources()},
        "backbone": {"name": Path(model.name).name if model.name else "toy", "dtype": model.dtype},
    }
    return Results(table=name, environment=environment, facts=facts, truths=truths, cells=cells)


def _parts(plan: Plan) -> Iterator[tuple[str, list[Arm]]]:
    """The arms that are run, in studies of those that read a task alike and have the same settings."""
    for mode, arms in plan.modes.items():
        for main in (True, False):
            if part := [arm for arm in arms if arm.main == main]:
                yield mode if main else f"{mode}-scales", part


def _chooser(plan: Plan, tiny: bool) -> Plan:
    """The plan whose held splits choose the rates."""
    if plan.rates_of is None:
        return plan
    chooser = PLANS[plan.rates_of].tiny() if tiny else PLANS[plan.rates_of]
    if missing := [family for family in plan.families if family not in chooser.families]:
        raise UsageError(f"rates_of = {plan.rates_of!r}: has no arm of {missing[0]}")
    return chooser


def _held(plan: Plan, home: Path, common: Mapping[str, Any]) -> _Cells:
    """The cells of the splits that are not reported: of arms that something is to be chosen for."""
    found: _Cells = []
    for mode, arms in plan.modes.items():
        chosen = [arm for arm in arms if arm.main and _open(plan, arm)]
        if chosen:
            values = grid(
                plan,
                chosen,
                seeds=plan.held,
                rates={arm.name: plan.rates[arm.method] for arm in chosen},
                singles={task: _singles(chosen, task) for task in plan.tasks},
                report=False,
                **common,
            )
            found += _cells(values, home / f"held-{mode}")
    return found


def _open(plan: Plan, arm: Arm) -> bool:
    return arm.preset == "single" or len(plan.rates[arm.method]) > 1


def _singles(arms: Sequence[Arm], task: str) -> tuple[str, ...]:
    return next((arm.sources(task) for arm in arms if arm.preset == "single"), ())


def _counts(cells: Sequence[Cell], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Task -> source of the single adapter -> for how many splits it was chosen."""
    counts: dict[str, dict[str, int]] = {}
    for cell in cells:
        if cell.arm in names:
            own = counts.setdefault(cell.task, {})
            own[cell.setting["variant"]] = own.get(cell.setting["variant"], 0) + 1
    return counts


def _cells(values: dict[str, Any], folder: Path) -> _Cells:
    """Run a grid, or take up its cells; the folder may hold others from before."""
    return run_study(read_grid(values), folder)


def _facts(name: str, record: RunRecord) -> dict[str, Any]:
    metric = str(record.data["metric"])
    return {
        "track": SOURCES[name].track,
        "rows": record.data["train_rows"],
        "removed": record.data["removed_rows"],
        "metric": metric,
        "score": round(record.results[metric], 4),
        "majority": round(record.results["majority"], 4),
        "seconds": round(record.seconds),
        "seed": record.seeds["module"],
        "adapter": record.model["adapter"],
    }
