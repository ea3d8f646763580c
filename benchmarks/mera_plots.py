"""The figures of MerA's benchmark, made from the files of cells of its tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.mera_arms import Plan
from benchmarks.mera_cells import Results
from benchmarks.mera_table import estimate, majority
from peft_lightning.analysis.plots import Curve
from peft_lightning.analysis.points import draw_points
from peft_lightning.errors import DataError

__all__ = ["FIGURES", "Figure", "draw_figure"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one picture shows.

    Attributes:
        plan: the table whose cells it is made of.
        arms: names of the arms; none: all of the plan.
        shots: the numbers shown; none: all.
        title: stands over it.
    """

    plan: str
    arms: tuple[str, ...] = ()
    shots: tuple[int, ...] = ()
    title: str


FIGURES = {
    "1": Figure(
        plan="1",
        arms=("full", "fusion", "adapter", "single", "avg", "acts", "acts+", "select"),
        title="Accuracy over shots per class: one adapter, and several merged",
    ),
    "2": Figure(
        plan="1", arms=("adapter", "single", "fusion"), shots=(10,), title="Single adapters and AdapterFusion, 10 shots"
    ),
    "3": Figure(plan="zero", title="Untrained: the backbone, random adapters, merged adapters, read by prompts"),
}
"""By the number of the paper's figure; its first is a drawing, which here is measured."""


def draw_figure(number: str, results: Results, plan: Plan, path: Path) -> None:
    """Draw one figure.

    Raises:
        DataError: no cell of it is there.
    """
    figure = FIGURES[number]
    arms = [arm for arm in plan.arms if arm.name in figure.arms or not figure.arms]
    panels: dict[str, dict[str, Curve]] = {}
    for task in plan.tasks:
        counts = [k for name, k in plan.settings if name == task and (k in figure.shots or not figure.shots)]
        for arm in arms:
            found = [(k, entry) for k in sorted(counts) if (entry := estimate(results, arm, (task, k)))]
            if found:
                panels.setdefault(task, {})[arm.title] = Curve(
                    x=[k for k, _ in found],
                    mean=[entry.value for _, entry in found],
                    low=[entry.low for _, entry in found],
                    high=[entry.high for _, entry in found],
                )
    if not panels:
        raise DataError("there is no cell to draw: run the benchmark of its table first")
    levels = {task: majority(results, task) for task in panels}
    title = f"{figure.title} ({len(plan.seeds)} splits, 95 % intervals)"
    draw_points(panels, levels, path, across="shots per class", up="accuracy", title=title)
