"""What a merge did, layer by layer, as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from peft_lightning.analysis.png import save_png
from peft_lightning.errors import UsageError

__all__ = ["draw_merge", "site_figure"]

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_PANELS = {
    "cosine": "matched cosine",
    "norm_ratio": "norm / mean norm of the adapters",
    "output_error": "output error against the mean",
    "scaled_output_error": "output error against what is stood for",
    "lost": "share lost by the cut to the rank",
}


def draw_merge(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw matched cosine, norm ratio and output error over the layers, a line for each place in a layer.

    Bands lie between the least and the largest of the adapters, without the one that the others are matched to. What a
    merge has no figure of has no panel; nor has the error against what the merged output stands for, where that is the
    mean.

    Args:
        report: a merge's: ``preset``, ``sources`` (names) and ``sites``.
        path: the PNG to write.

    Raises:
        UsageError: if the report has no figure.
    """
    from matplotlib.figure import Figure

    found = {name: lines for name in _PANELS if (lines := _lines(report, name))}
    if found.get("scaled_output_error") == found.get("output_error"):  # the scale is the mean
        found.pop("scaled_output_error", None)
    panels = {_PANELS[name]: lines for name, lines in found.items()}
    if not panels:
        raise UsageError("the merge's report has no figure to draw")
    places = list(dict.fromkeys(place for lines in panels.values() for place in lines))
    figure = Figure(figsize=(4.8 * len(panels) + 1.4, 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for place, points in lines.items():
            layers, low, mean, high = zip(*points, strict=True)
            colour = _COLOURS[places.index(place) % len(_COLOURS)]
            axes.plot(layers, mean, "o-", color=colour, label=place, linewidth=1.5, markersize=3.5)
            axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("layer")
        axes.set_ylabel(title)
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(0.0, bottom), max(0.01, top * 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*_handles(figure.axes), fontsize=8, loc="outside right center")
    title = f"{report['preset']}: {', '.join(report['sources'])}"
    figure.suptitle(fill(title, 65 * len(panels), break_on_hyphens=False), fontsize=9)
    save_png(figure, path)


def _handles(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Lines and their labels, each once."""
    found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def site_figure(report: Mapping[str, Any], site: str, name: str) -> list[float]:
    """What a report says of one site: a number, or one for each adapter but the one that others are matched to.

    Args:
        report: as of :func:`draw_merge`.
        site: one of its sites.
        name: of the figure, as ``cosine`` or ``norm_ratio``.

    Returns:
        The numbers; none where the figure is missing or unknown.
    """
    figures = report["sites"][site]
    found = figures.get(name)
    values = list(found) if isinstance(found, Sequence) else [found]
    reference = figures.get("reference")
    if len(values) > 1 and reference in report["sources"]:
        values.pop(list(report["sources"]).index(reference))
    return [value for value in values if value is not None]


def _lines(report: Mapping[str, Any], name: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """Place in a layer -> layer (from 0, as sites are named), least, mean and largest value; none without a value."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for site in report["sites"]:
        if values := site_figure(report, site, name):
            stack, number, place = re.fullmatch(r"(\D*)(\d+)?\.?(.*)", site).groups()  # type: ignore[union-attr]
            side = next((word for word in ("encoder", "decoder") if stack.startswith(f"{word}.")), "")
            several = len({path.partition(".")[0] for path in report["sites"]}) > 1
            label = " ".join(part for part in (side if several else "", place or "layer") if part)
            point = (int(number or 0), min(values), sum(values) / len(values), max(values))
            lines.setdefault(label, []).append(point)
    return lines
