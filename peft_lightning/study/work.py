"""What a study does with a group of cells: trains and measures them, side by side where there are several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from peft_lightning.backbones.sharing import SharedBackbones
from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.errors import PeftLightningError, first_line
from peft_lightning.study.alone import run_alone
from peft_lightning.study.block import shape_of
from peft_lightning.study.cells import Cell
from peft_lightning.study.evaluation import majority
from peft_lightning.study.loop import LoopTrainer, prepare
from peft_lightning.study.outcome import Outcome, Tick
from peft_lightning.study.results import versions
from peft_lightning.study.splits import Splits
from peft_lightning.study.together import Prepared, run_together
from peft_lightning.task_module import TaskModule

__all__ = ["Work"]

Record = dict[str, Any]


class Work:
    """Runs groups of cells on one device.

    Args:
        splits: the rows of the cells.
        shared: the backbones, which every cell leaves as they were.
        device: of all.
    """

    def __init__(self, splits: Splits, shared: SharedBackbones, device: torch.device) -> None:
        self.splits, self.shared, self.device = splits, shared, device
        self.versions = versions(device)

    def run(self, group: Sequence[Cell], tick: Tick) -> list[Record]:
        """Run cells, side by side where there are several; their records, also of those that fail.

        Raises:
            PeftLightningError: something changed a shared backbone.
        """
        started = time.perf_counter()
        outcomes = self._together(group, tick) if len(group) > 1 else [self._caught(group[0], tick)]
        each = (time.perf_counter() - started) / len(group)
        self.shared.check()
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
