"""Scores with their intervals, side by side where they would hide one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft_lightning.analysis.plots import Curve
from peft_lightning.analysis.png import save_png
from peft_lightning.errors import UsageError

__all__ = ["draw_points"]

# Tol's muted scheme, the dark ones first; a second round has other marks.
_COLOURS = ("#332288", "#cc6677", "#117733", "#ddcc77", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499")
_MARKS = ("o", "s", "^", "D")
_WIDTH = 0.5  # share of a unit of the horizontal axis that the points of one place take


def draw_points(
    panels: Mapping[str, Mapping[str, Curve]],
    levels: Mapping[str, float],
    path: str | Path,
    *,
    across: str,
    up: str,
    title: str,
) -> None:
    """Draw a panel per task; every curve is points with bars, joined by a line, a little beside the others.

    Places are equally far apart, whatever their numbers, which stand under them.

    Args:
        panels: task -> label -> curve; a curve of one point is a lone mark, a label looks alike in all panels.
        levels: task -> what needs no model; a dashed line.
        path: the PNG to write.
        across: name of the horizontal axis.
        up: name of the vertical axis.
        title: stands over the whole.

    Raises:
        UsageError: if there is no panel, or one without a curve.
    """
    from matplotlib.figure import Figure

    if not panels or not all(panels.values()):
        raise UsageError("panels is empty, or one of them: a picture needs at least one, and that a curve")
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    figure = Figure(figsize=(1.4 + 3.4 * len(panels), 3.9), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        places = sorted({x for curve in curves.values() for x in curve.x})
        for label, curve in curves.items():
            number = labels.index(label)
            aside = _WIDTH * ((number + 0.5) / len(labels) - 0.5)
            below = [mean - low for mean, low in zip(curve.mean, curve.low, strict=True)]
            above = [high - mean for mean, high in zip(curve.mean, curve.high, strict=True)]
            axes.errorbar(
                [places.index(x) + aside for x in curve.x],
                curve.mean,
                yerr=[below, above],
                fmt=f"{_MARKS[number // len(_COLOURS) % len(_MARKS)]}-",
                color=_COLOURS[number % len(_COLOURS)],
                capsize=2,
                markersize=4,
                linewidth=1,
                label=label,
            )
        if name in levels:
            axes.axhline(levels[name], color="#555555", linestyle="--", linewidth=1, label="majority class")
        axes.set_xticks(range(len(places)), labels=[f"{place:g}" for place in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.set_title(name, fontsize=9)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside right center")
    figure.suptitle(title, fontsize=9)
    save_png(figure, path)
