"""What a study consists of, as a user writes it: backbone, data, tasks, seeds, rates, epochs and methods.

Every combination is a cell. What the parts of a cell share is said once and may be refined: a task refines the data, a
method the rates and epochs, a variant or a task the method's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from peft_lightning import methods
from peft_lightning.backbones.build import as_backbone_config
from peft_lightning.checks import check_choices, check_types, nearest
from peft_lightning.errors import UsageError
from peft_lightning.study.options import check_known, check_lengths, check_numbers, mapping
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.table import get_task
from peft_lightning.trust import find_class

__all__ = ["DataRegime", "Grid", "MethodGrid", "merged_settings", "read_grid"]

_GIVEN = {
    "self": "",
    "task": "the grid's tasks",
    "seed": "the grid's seeds",
    "max_length": "the grid's data",
}
_PER_TASK = ("init_args", "variants")
_EPOCHS = (10,)
_Concept = TypeVar("_Concept")


@dataclass(frozen=True, kw_only=True)
class DataRegime:
    """How a task is read; the fields are options of ``FewShotDataModule``.

    Attributes:
        task: name of a row of the task table, or the fields of a row; null: the name that the grid gives it.
        root: a folder that holds the task's folder.
        splits: from a stage to the split it reads, where not the task's own.
        shots: numbers K of shots, a cell each.
        shots_mode: per_class or total.
        calibration: what merges read without labels: shots, or pool (rows that are none).
        calibration_rows: how many of the pool.
        test_rows: how many rows are reported on at most; all if null.
        batch_size: rows of a training batch.
        eval_batch_size: rows that are read at once where nothing trains, of all cells together.
        max_length: tokens of a row at most.
        cache_dir: of the encoded splits.

    Raises:
        UsageError: a value is not allowed.
    """

    task: str | dict[str, Any] | None = None
    root: str | None = None
    splits: dict[str, str] | None = None
    shots: list[int] = field(default_factory=lambda: [10])
    shots_mode: str = "per_class"
    calibration: str = "shots"
    calibration_rows: int = 128
    test_rows: int | None = None
    batch_size: int = 8
    eval_batch_size: int = 64
    max_length: int = 128
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "data")
        check_numbers("data.shots", self.shots, int, 1)
        for name in ("batch_size", "eval_batch_size", "test_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"data.{name} = {value}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MethodGrid:
    """A method and what is varied of it.

    Attributes:
        class_path: a method of this package by its name, or ``package.module.Class``.
        init_args: its arguments; ``backbone`` holds what differs from the grid's.
        variants: name -> arguments over these, a cell each.
        per_task: task -> ``init_args`` over these, and ``variants`` instead of these.
        lr: rates instead of the grid's.
        epochs: instead of the grid's epochs or steps.
        steps: likewise.
        precision: instead of the grid's.

    Raises:
        UsageError: a value is not allowed.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    lr: list[float] | None = None
    epochs: list[int] | None = None
    steps: list[int] | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "method")
        check_lengths(self, "method")
        for task, given in self.per_task.items():
            check_known(given, _PER_TASK, f"per_task.{task}")
        for arguments in self._arguments():
            self._check_arguments(arguments)

    @property
    def method(self) -> type[TaskModule]:
        """The class itself.

        Raises:
            UsageError: there is none, it is of no trusted package, or it is no method for a labelled task.
        """
        path = self.class_path
        if "." not in path and path not in methods.__all__:
            raise UsageError(f"class_path = {path!r}: must be {', '.join(methods.__all__)}, or a path")
        return find_class(path if "." in path else f"{methods.__name__}.{path}", TaskModule, "class_path")

    def arguments(self, task: str) -> dict[str, dict[str, Any]]:
        """Variant -> arguments for a task; a method without variants has one, called default."""
        here = self.per_task.get(task, {})
        common = merged_settings(self.init_args, here.get("init_args", {}))
        variants = here.get("variants", self.variants) or {"default": {}}
        return {name: merged_settings(common, given) for name, given in variants.items()}

    def _arguments(self) -> list[Any]:
        given: list[Any] = [self.init_args, *self.variants.values()]
        for here in self.per_task.values():
            variants = here.get("variants", {})
            if not isinstance(variants, Mapping):
                raise UsageError(f"per_task: variants = {variants!r}: must be a mapping from names to arguments")
            given += [here.get("init_args", {}), *variants.values()]
        return given

    def _check_arguments(self, arguments: Any) -> None:
        allowed = [name for name in inspect.signature(self.method.__init__).parameters if name not in _GIVEN]
        if not isinstance(arguments, Mapping):
            raise UsageError(f"arguments of {self.class_path} = {arguments!r}: must be a mapping")
        for name in arguments:
            if name not in allowed:
                instead = f"; it follows from {_GIVEN[name]}" if name in _GIVEN else ""
                raise UsageError(
                    f"{self.class_path} has no argument {name!r} here{nearest(name, allowed)}; allowed: "
                    f"{', '.join(allowed)}{instead}"
                )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A whole study.

    Attributes:
        backbone: of all methods: a name, or the fields of a ``BackboneConfig``.
        data: of all tasks, fields of a :class:`DataRegime`.
        tasks: names, or name -> what differs from ``data``.
        seeds: of the data splits; each is the module's and the order's as well.
        lr: rates.
        epochs: 0: what a method is before its first step, with whatever it decides before it; ten if neither these nor
            steps are given.
        steps: of the optimiser, instead of epochs.
        methods: name -> method.
        side_by_side: cells in one batch at most, where their shapes allow it.
        workers: processes that share out cells and threads; from Python they need ``if __name__ == "__main__":``.
        select: last (weights of the last epoch) or best (of the epoch that was best on the dev shots).
        precision: 32-true or bf16-mixed.
        device: auto, cpu or cuda.

    Raises:
        UsageError: a value is not allowed.
    """

    backbone: str | dict[str, Any]
    tasks: list[Any] | dict[str, Any]
    methods: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [13, 21, 42, 87, 100])
    lr: list[float] = field(default_factory=lambda: [1e-3])
    epochs: list[int] | None = None
    steps: list[int] | None = None
    side_by_side: int = 8
    workers: int = 1
    select: str = "last"
    precision: str = "32-true"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_types(self, "study")
        check_choices(self, "study", select=("last", "best"), device=("auto", "cpu", "cuda"))
        check_lengths(self, "study")
        check_numbers("study.seeds", self.seeds, int, 0)
        for name in ("side_by_side", "workers"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"study.{name} = {value}: must be at least 1")
        as_backbone_config(self.backbone_fields)
        for name in ("tasks", "methods"):
            if not getattr(self, name):
                raise UsageError(f"study.{name} is empty; allowed: at least one")
        for name, method in self.method_grids.items():
            if odd := sorted(set(method.per_task) - self.regimes.keys()):
                raise UsageError(f"methods.{name}.per_task has {odd[0]!r}; allowed: {', '.join(self.regimes)}")

    @property
    def backbone_fields(self) -> dict[str, Any]:
        """The backbone as fields of a ``BackboneConfig``."""
        return {"name": self.backbone} if isinstance(self.backbone, str) else self.backbone

    @property
    def regimes(self) -> dict[str, DataRegime]:
        """Task -> its data."""
        listed = self.tasks if isinstance(self.tasks, dict) else {_name(task): {} for task in self.tasks}
        if len(listed) < len(self.tasks):
            raise UsageError(f"study.tasks = {self.tasks}: must name each task once")
        found = {}
        for name, given in listed.items():
            values = {"task": name, **self.data, **mapping(given or {}, f"tasks.{name}")}
            found[name] = _concept(DataRegime, values, f"data of {name}")
            get_task(found[name].task or name)
        return found

    def lengths(self, method: MethodGrid) -> list[tuple[int | None, int | None]]:
        """Epochs and steps of a method's cells; one of the two is None."""
        given = self if method.epochs is method.steps is None else method
        if given.steps is not None:
            return [(None, steps) for steps in given.steps]
        return [(epochs, None) for epochs in given.epochs or _EPOCHS]

    @property
    def method_grids(self) -> dict[str, MethodGrid]:
        """Name -> method."""
        return {name: _concept(MethodGrid, given, f"methods.{name}") for name, given in self.methods.items()}


def read_grid(values: Any) -> Grid:
    """A grid from what a YAML file holds.

    Raises:
        UsageError: an option is unknown, missing, or has a value that is not allowed; in one line that names it.
    """
    return _concept(Grid, values, "study")


def merged_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first mapping with the second's values in place of its own, mapping by mapping."""
    merged = dict(first)
    for name, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merged_settings(merged[name], value) if both else value
    return merged


def _concept(kind: type[_Concept], values: Any, where: str) -> _Concept:
    given = mapping(values, where)
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    check_known(given, tuple(known), where)
    try:
        return kind(**given)
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where != "study" else str(error)) from None
    except TypeError as error:
        lacking = [name for name in inspect.signature(kind).parameters if name not in given]
        raise UsageError(f"{where}: {error}; allowed beside what is given: {', '.join(lacking)}") from None


def _name(task: Any) -> str:
    if not isinstance(task, str):
        raise UsageError(f"study.tasks has {task!r}; allowed: names, or a mapping from names to what differs from data")
    return task
