"""Runs the cells of a study: what is finished is not repeated, what fails does not stop the rest."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peft_lightning.backbones.sharing import sharing_backbones
from peft_lightning.errors import UsageError
from peft_lightning.study.cells import cells_of
from peft_lightning.study.checking import check_cells
from peft_lightning.study.grid import Grid
from peft_lightning.study.identity import Identities
from peft_lightning.study.planning import plan
from peft_lightning.study.progress import Progress
from peft_lightning.study.records import environment
from peft_lightning.study.results import StudyFolder, write_json
from peft_lightning.study.splits import Splits
from peft_lightning.study.work import Work
from peft_lightning.study.workers import in_this_process, in_workers

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
        PeftLightningError: something changed the shared backbone, or a worker died.
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
        work = Work(splits, shared, device)
        names = {id(cell): digest for digest, cell in missing.items()}
        groups = plan(list(missing.values()), grid.side_by_side, shared)
        workers = min(grid.workers, len(groups))
        progress = Progress(list(missing.values()), len(found), workers)
        if workers > 1:
            done = in_workers(groups, grid.seeds, device, workers, progress)
        else:
            done = in_this_process(groups, work, progress)
        for group, records in done:
            for cell, record in zip(group, records, strict=True):
                found[names[id(cell)]] = record
                folder.write(names[id(cell)], record)
        write_json(folder.folder / "study.json", {**about, "majority": work.majorities(cells)})
    # The names of a cell are this grid's, whatever they were when it was run.
    return [{**found[digest], "cell": cell.key} for digest, cell in zip(digests, cells, strict=True)]


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("study.device = 'cuda': there is none; allowed here: auto, cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
