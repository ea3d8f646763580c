"""Runs the cells of a study in one process: what is finished is not repeated, what fails does not stop the rest."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peft_lightning.backbones.sharing import SharedBackbones, sharing_backbones
from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.errors import PeftLightningError, UsageError, first_line
from peft_lightning.study.alone import run_alone
from peft_lightning.study.block import shape_of
from peft_lightning.study.cells import Cell, cells_of
from peft_lightning.study.checking import check_cells
from peft_lightning.study.evaluation import majority
from peft_lightning.study.grid import Grid
from peft_lightning.study.identity import Identities
from peft_lightning.study.loop import LoopTrainer, prepare
from peft_lightning.study.outcome import Outcome, Tick
from peft_lightning.study.planning import plan
from peft_lightning.study.progress import Progress
from peft_lightning.study.records import environment
from peft_lightning.study.results import StudyFolder, versions, write_json
from peft_lightning.study.splits import Splits
from peft_lightning.study.together import Prepared, run_together
from peft_lightning.task_module import TaskModule

__all__ = ["StudyWarning", "run_study"]

Record = dict[str, Any]


class StudyWarning(UserWarning):
    """A study changes what an earlier one left."""


def run_study(grid: Grid, output: str | Path) -> list[Record]:
    """Run what is missing of a grid; warns of finished cells in the folder that are another grid's.

    Args:
        grid: what is wanted.
        output: a folder, new or of an earlier study; cells that are finished there are taken as they are.

    Returns:
        The record of every cell, in the grid's order; one that failed has an ``error``.

    Raises:
        UsageError: something is wrong with the grid as a whole, or there is no such device.
        DataError: rows of a task cannot be read or are too few, adapters that a method starts from are missing or
            another backbone's, or the folder cannot be written; before the first cell.
        PeftLightningError: something changed the shared backbone.
    """
    device, folder, cells = _device(grid.device), StudyFolder(output), cells_of(grid)
    with ExitStack() as stack:
        shared = stack.enter_context(sharing_backbones(device))
        splits, identities = Splits(grid.seeds), Identities()
        digests = [identities.digest(cell, splits.rows(cell)) for cell in cells]
        stack.enter_context(folder.alone())
        found = {digest: record for digest in dict.fromkeys(digests) if (record := folder.finished(digest))}
        missing = {digest: cell for digest, cell in zip(digests, cells, strict=True) if digest not in found}
        check_cells(list(missing.values()), splits)
        keys = [cell.key for cell in cells]
        if note := folder.replaced(digests):
            warnings.warn(note, StudyWarning, stacklevel=2)
        about = {"grid": asdict(grid), "cells": list(zip(digests, keys, strict=True)), "environment": environment()}
        write_json(folder.folder / "study.json", {**about, "majority": {}})
        work = _Work(splits, shared, device)
        names = {id(cell): digest for digest, cell in missing.items()}
        progress = Progress(list(missing.values()), len(found))
        for group in plan(list(missing.values()), grid.side_by_side, shared):
            progress.begin(group)
            records = work.run(group, progress.tick)
            shared.check()
            for cell, record in zip(group, records, strict=True):
                found[names[id(cell)]] = record
                folder.write(names[id(cell)], record)
            progress.end(sum("error" in record for record in records))
        write_json(folder.folder / "study.json", {**about, "majority": work.majorities(cells)})
    # The names of a cell are this grid's, whatever they were when it was run.
    return [{**found[digest], "cell": cell.key} for digest, cell in zip(digests, cells, strict=True)]


class _Work:
    """Runs groups of cells."""

    def __init__(self, splits: Splits, shared: SharedBackbones, device: torch.device) -> None:
        self.splits, self.shared, self.device = splits, shared, device
        self.versions = versions(device)

    def run(self, group: Sequence[Cell], tick: Tick) -> list[Record]:
        """Run cells, side by side where there are several; their records, also of those that fail."""
        started = time.perf_counter()
        outcomes = self._together(group, tick) if len(group) > 1 else [self._caught(group[0], tick)]
        each = (time.perf_counter() - started) / len(group)
        return [
            {"cell": cell.key, **_content(cell, outcome), "seconds": each, "side_by_side": len(group)}
            | {"versions": self.versions}
            for cell, outcome in zip(group, outcomes, strict=True)
        ]

    def majorities(self, cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
        """Task -> metrics of its majority class, or of what is called so of its kind; as far as there is data."""
        found: dict[str, dict[str, float]] = {}
        for cell in cells:
            if cell.task not in found:
                with suppress(PeftLightningError):
                    found[cell.task] = majority(cell.module(), self.splits.data(cell))
        return found

    def _alone(self, cell: Cell, tick: Tick) -> Outcome:
        module, data = self._built(cell, 1)
        outcome = run_alone(
            module,
            data,
            device=self.device,
            precision=cell.precision,
            epochs=cell.epochs,
            steps=cell.steps,
            select=cell.select,
            tick=tick,
        )
        outcome.check()
        return outcome

    def _caught(self, cell: Cell, tick: Tick) -> Outcome | Exception:
        try:
            return self._alone(cell, tick)
        except Exception as error:  # whatever it is, other cells may not have it
            return error

    def _together(self, group: Sequence[Cell], tick: Tick) -> list[Outcome | Exception]:
        outcomes: dict[int, Outcome | Exception] = {}
        blocks: dict[Any, dict[int, Prepared]] = {}
        for cell in group:
            try:
                prepared, alike = self._prepared(cell, len(group))
            except Exception as error:
                outcomes[id(cell)] = error
            else:
                blocks.setdefault(alike, {})[id(cell)] = prepared
        for block in blocks.values():
            try:
                found = run_together(list(block.values()), group[0].select, tick)
            except Exception as error:
                # Perhaps they are too many; the cell that it is the fault of comes to stand alone.
                again = [cell for cell in group if id(cell) in block]
                found = [error] if len(again) == 1 else self._halves(again, tick)
            outcomes |= zip(block, map(_checked, found), strict=True)
        return [outcomes[id(cell)] for cell in group]

    def _halves(self, group: Sequence[Cell], tick: Tick) -> list[Outcome | Exception]:
        parts = group[: len(group) // 2], group[len(group) // 2 :]
        return [outcome for part in parts for outcome in self._together(part, tick)]

    def _prepared(self, cell: Cell, count: int) -> tuple[Prepared, Any]:
        """A cell at its first step, and what those of its block must have in common."""
        module, data = self._built(cell, count)
        trainer = LoopTrainer(data, self.device, cell.precision, cell.epochs, cell.steps)
        prepare(module, trainer)
        alike = tuple(len(data.loader(stage)) for stage in ("train", "validation")), shape_of(module, self.shared)
        return Prepared(module=module, data=data, trainer=trainer), alike

    def _built(self, cell: Cell, count: int) -> tuple[TaskModule, FewShotDataModule]:
        module = cell.module()
        module.configure_model()
        self.shared.release(module)
        data = self.splits.data(cell)
        data.eval_batch_size = max(1, cell.regime.eval_batch_size // count)
        return module, data


def _checked(outcome: Outcome | Exception) -> Outcome | Exception:
    try:
        if isinstance(outcome, Outcome):
            outcome.check()
    except PeftLightningError as error:
        return error
    return outcome


def _content(cell: Cell, outcome: Outcome | Exception) -> Record:
    """What a record holds of a result."""
    if isinstance(outcome, Exception):
        kind = "" if isinstance(outcome, PeftLightningError) else f"{type(outcome).__name__}: "
        return {"error": f"{kind}{first_line(outcome)}"}
    return {
        "metric": list(outcome.test.metrics)[0],
        "dev": outcome.dev.metrics,
        "test": outcome.test.metrics,
        "predictions": outcome.test.predictions,
        "truths": outcome.test.truths,
        "losses": outcome.losses,
        "steps": outcome.steps,
        "epoch": outcome.epoch,
        "skipped_steps": outcome.skipped,
        "trained_parameters": outcome.trained_parameters,
    }


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("study.device = 'cuda': there is none; allowed here: auto, cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
