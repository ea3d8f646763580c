"""Pictures of what a method decided, and of what several runs gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_lightning.analysis.png import save_png
from peft_lightning.errors import UsageError

__all__ = ["Curve", "draw_curves", "draw_layers", "draw_shares", "draw_sweep"]

# Tol's bright scheme, which colour-blind readers can tell apart.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_GROUND = "#e4e4e4"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of several runs: a mean and what lies around it.

    Attributes:
        x: where the points are.
        mean: their heights, as many.
        low: the lower end at each, as many.
        high: the upper end at each, as many.

    Raises:
        UsageError: if the numbers of points differ.
    """

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    def __post_init__(self) -> None:
        counts = {name: len(getattr(self, name)) for name in ("x", "mean", "low", "high")}
        if len(set(counts.values())) > 1:
            raise UsageError(f"a curve has {counts} points: the numbers must be equal")


def draw_shares(shares: Mapping[str, float], path: str | Path) -> None:
    """Draw the kept share of each matrix as a horizontal bar, in the model's order from top to bottom.

    Args:
        shares: name of a matrix -> share kept, in [0, 1].
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.22 * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shares)), list(shares.values()), color="#4477aa")
    axes.set_yticks(range(len(shares)), labels=list(shares), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of weights kept")
    axes.set_title("what the adapters kept, matrix by matrix", fontsize=9)
    save_png(figure, path)


def draw_curves(panels: Mapping[str, Mapping[str, Curve]], path: str | Path, *, across: str, title: str) -> None:
    """Draw panels side by side, each with a line and a band for every curve; a label has one colour in all.

    Args:
        panels: name of a panel's vertical axis -> label -> curve.
        path: the PNG to write.
        across: name of the horizontal axis.
        title: stands over the whole.

    Raises:
        UsageError: if there is no panel.
    """
    figure, colours, parts = _panels(panels)
    for axes, name, curves in parts:
        for label, curve in curves.items():
            _draw_band(axes, curve, colours[label], label, style="-")
        axes.set_xlabel(across)
        axes.set_ylabel(name)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_png(figure, path)


def draw_layers(
    panels: Mapping[str, Mapping[str, Curve]],
    levels: Mapping[str, float],
    path: str | Path,
    *,
    up: str,
    title: str,
    shaded: tuple[int, int] | None = None,
) -> None:
    """Draw what each layer holds: a panel per task, over the layers a line and a band for every model.

    Args:
        panels: task -> label of a model -> curve over the numbers of its layers, 0 for the embeddings.
        levels: task -> what needs no model; a dashed line.
        path: the PNG to write.
        up: name of the vertical axis.
        title: stands over the whole.
        shaded: first and last of the layers to stand before a grey ground, such as those that dropped tokens.

    Raises:
        UsageError: if there is no panel.
    """
    figure, colours, parts = _panels(panels)
    for axes, name, curves in parts:
        if shaded is not None:
            axes.axvspan(shaded[0] - 0.5, shaded[1] + 0.5, color=_GROUND, linewidth=0, zorder=0)
        for label, curve in curves.items():
            _draw_band(axes, curve, colours[label], label, style="o-")
        if name in levels:
            axes.axhline(levels[name], color="#555555", linestyle="--", linewidth=1, label="majority class")
        axes.set_xlim(-0.5, max(max(curve.x) for curve in curves.values()) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer (0: embeddings)")
        axes.set_ylabel(up)
        axes.set_title(name, fontsize=9)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_png(figure, path)


def draw_sweep(
    sweep: Mapping[str, Curve], level: Mapping[str, Curve], path: str | Path, *, across: str, up: str, title: str
) -> None:
    """Draw points with error bars over a setting, and beside them what does not depend on it as a level line.

    Args:
        sweep: label -> curve; a curve of one point is a lone mark.
        level: label -> curve of one point, drawn from side to side with its band.
        path: the PNG to write.
        across: name of the horizontal axis.
        up: name of the vertical axis.
        title: stands over the whole.

    Raises:
        UsageError: if a level has not one point.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (label, curve) in enumerate(level.items()):
        if len(curve.x) != 1:
            raise UsageError(f"level {label!r} has {len(curve.x)} points: it must have one")
        grey = ("#555555", "#999999")[number % 2]
        axes.axhline(curve.mean[0], color=grey, linestyle="--", label=label)
        axes.axhspan(curve.low[0], curve.high[0], color=grey, alpha=0.12, linewidth=0)
    for number, (label, curve) in enumerate(sweep.items()):
        below = [mean - low for mean, low in zip(curve.mean, curve.low, strict=True)]
        above = [high - mean for mean, high in zip(curve.mean, curve.high, strict=True)]
        style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "capsize": 3, "label": label}
        marker = "o-" if len(curve.x) > 1 else "D"
        axes.errorbar(curve.x, curve.mean, yerr=[below, above], fmt=marker, **style)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    save_png(figure, path)


def _panels(
    panels: Mapping[str, Mapping[str, Curve]],
) -> tuple[Any, dict[str, str], list[tuple[Any, str, Mapping[str, Curve]]]]:
    """A figure, the colour of each label, and per panel its axes, name and curves."""
    from matplotlib.figure import Figure

    if not panels:
        raise UsageError("panels is empty: a picture needs at least one")
    labels = dict.fromkeys(label for curves in panels.values() for label in curves)
    colours = {label: _COLOURS[number % len(_COLOURS)] for number, label in enumerate(labels)}
    figure = Figure(figsize=(4.8 * len(panels), 3.6), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    return figure, colours, [(axes, *panel) for axes, panel in zip(places, panels.items(), strict=True)]


def _draw_band(axes: Any, curve: Curve, colour: str, label: str, *, style: str) -> None:
    """A line, with marks if the style has them, and its band."""
    axes.plot(curve.x, curve.mean, style, color=colour, label=label, linewidth=1.5, markersize=3.5)
    axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
