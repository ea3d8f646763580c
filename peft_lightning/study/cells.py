"""The cells of a study, one run each, from the combinations of its grid."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from itertools import product
from typing import Any

from peft_lightning.errors import UsageError
from peft_lightning.study.grid import DataRegime, Grid, merged_settings
from peft_lightning.task_module import TaskModule

__all__ = ["Cell", "cells_of"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        method: its name in the grid.
        variant: likewise.
        task: likewise.
        shots: K.
        seed: of the data split, the order, and the module.
        lr: rate; None where nothing trains.
        epochs: how many; None where steps are given.
        steps: of the optimiser; None where epochs are given.
        kind: the method's class.
        arguments: of the class, but for task, seed and length.
        regime: how the task is read.
        precision: 32-true or bf16-mixed.
        select: last or best.
    """

    method: str
    variant: str
    task: str
    shots: int
    seed: int
    lr: float | None
    epochs: int | None
    steps: int | None
    kind: type[TaskModule]
    arguments: Mapping[str, Any]
    regime: DataRegime
    precision: str
    select: str

    @property
    def key(self) -> dict[str, Any]:
        """What distinguishes it inside of its grid, plain values."""
        names = ("method", "variant", "task", "shots", "seed", "lr", "epochs")
        steps = {} if self.steps is None else {"steps": self.steps}
        return {**{name: getattr(self, name) for name in names}, **steps}

    @property
    def title(self) -> str:
        """One line for people."""
        rate = "" if self.lr is None else f"  lr {self.lr:g}"
        variant = "" if self.variant == "default" else f" {self.variant}"
        length = f"{self.epochs} epochs" if self.steps is None else f"{self.steps} steps"
        return f"{self.method}{variant}  {self.task}  {self.shots} shots  seed {self.seed}{rate}  {length}"

    def module(self) -> TaskModule:
        """A new module, not built yet.

        Raises:
            UsageError: an argument has a value that is not allowed.
        """
        given = {"task": self.regime.task or self.task, "seed": self.seed, "max_length": self.regime.max_length}
        try:
            return self.kind(**{**self.arguments, **given})
        except (TypeError, UsageError) as error:
            raise UsageError(f"methods.{self.method} ({self.variant}): {error}") from None


def cells_of(grid: Grid) -> list[Cell]:
    """All cells of a grid, in its order: tasks, shots, seeds, methods, variants, epochs or steps, rates.

    Where nothing trains there is one cell for all rates.
    """
    return [
        Cell(
            method=method,
            variant=variant,
            task=task,
            shots=shots,
            seed=seed,
            lr=lr,
            epochs=epochs,
            steps=steps,
            kind=entry.method,
            arguments=_arguments(entry.method, given, grid.backbone_fields, lr),
            regime=regime,
            precision=entry.precision or grid.precision,
            select=grid.select,
        )
        for task, regime in grid.regimes.items()
        for shots, seed in product(regime.shots, grid.seeds)
        for method, entry in grid.method_grids.items()
        for variant, given in entry.arguments(task).items()
        for epochs, steps in grid.lengths(entry)
        for lr in ((grid.lr if entry.lr is None else entry.lr) if epochs != 0 else (None,))
    ]


def _arguments(
    kind: type[TaskModule], given: Mapping[str, Any], backbone: Mapping[str, Any], lr: float | None
) -> dict[str, Any]:
    """Arguments over a class's own defaults, so that one field of a group leaves the others as they are."""
    merged = merged_settings({"backbone": backbone}, given)
    if lr is not None:
        merged = merged_settings(merged, {"optim": {"lr": lr}})
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in merged and is_dataclass(parameter.default) and isinstance(merged[name], Mapping):
            merged[name] = merged_settings(asdict(parameter.default), merged[name])  # type: ignore[arg-type]
    return merged
