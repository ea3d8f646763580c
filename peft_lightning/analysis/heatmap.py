"""The importance of heads as a picture: blocks x heads, one panel a task (Prune-LoRA, figure 1).

Blocks and heads are numbered from 1 here, as people count them, and from 0 in files. The first block is at the bottom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_lightning.analysis.png import save_png
from peft_lightning.errors import UsageError

__all__ = ["draw_heads", "short_labels"]

_CROSS = "#ee6677"


def draw_heads(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    title: str,
    gone: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> None:
    """Draw panels side by side, each with a row for every attention and a cell for every head; one scale for all.

    Args:
        panels: label -> path of an attention -> importance of its heads, in [0, 1]. Attentions may have different
            numbers of heads; what is missing stays blank.
        path: the PNG to write.
        title: stands over the whole.
        gone: label -> path of an attention -> heads to mark with a cross, by their numbers (from 0) in the whole
            backbone.

    Raises:
        UsageError: if there is no panel, or no head in one, or a head to mark does not exist.
    """
    from matplotlib.figure import Figure

    if not panels or not all(any(map(len, rows.values())) for rows in panels.values()):
        raise UsageError("panels is empty: a picture needs at least one, with a head")
    _check_gone(panels, gone or {})
    tallest = max(len(rows) for rows in panels.values())
    widest = max(len(heads) for rows in panels.values() for heads in rows.values())
    size = (1.6 + len(panels) * (1.2 + 0.2 * widest), 1.5 + 0.2 * tallest)
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, rows) in zip(places, panels.items(), strict=True):
        cells = _draw_panel(axes, rows, (gone or {}).get(label, {}))
        axes.set_title(label, fontsize=8)
    figure.colorbar(cells, ax=list(places), label="importance")
    figure.suptitle(title, fontsize=9)
    save_png(figure, path)


def short_labels(paths: Sequence[str]) -> list[str]:
    """What tells paths of layers or attentions apart: their numbers, from 1, and the words in which they differ.

    >>> short_labels(["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"])
    ['1', '2']
    >>> short_labels(["encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn"])
    ['encoder 1 self_attn', 'decoder 1 self_attn', 'decoder 1 encoder_attn']
    """
    columns = list(zip(*(path.split(".") for path in paths), strict=False))
    if any(path.count(".") + 1 != len(columns) for path in paths):
        return list(paths)
    telling = [words for words in columns if len(set(words)) > 1 or words[0].isdecimal()]
    counted = [[str(int(word) + 1) if word.isdecimal() else word for word in words] for words in telling]
    return [" ".join(words) for words in zip(*counted, strict=True)] if counted else list(paths)


def _draw_panel(axes: Any, rows: Mapping[str, Sequence[float]], gone: Mapping[str, Sequence[int]]) -> Any:
    """The cells of one panel."""
    width = max(map(len, rows.values()))
    values = [[*heads, *[float("nan")] * (width - len(heads))] for heads in rows.values()]
    cells = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    crosses = [(head, row) for row, path in enumerate(rows) for head in gone.get(path, ())]
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color=_CROSS, markersize=6, markeredgewidth=1.5, linestyle="none")
    labels = short_labels(list(rows))
    axes.set_yticks(range(len(rows)), labels=labels, fontsize=7)
    axes.set_ylabel("block" if all(label.isdecimal() for label in labels) else "attention")
    step = 1 + (width - 1) // 16
    axes.set_xticks(range(0, width, step), labels=range(1, width + 1, step), fontsize=7)
    axes.set_xlabel("head")
    return cells


def _check_gone(
    panels: Mapping[str, Mapping[str, Sequence[float]]], gone: Mapping[str, Mapping[str, Sequence[int]]]
) -> None:
    for label, rows in gone.items():
        for path, heads in rows.items():
            count = len(panels.get(label, {}).get(path, ()))
            if wrong := [head for head in heads if not 0 <= head < count]:
                raise UsageError(f"gone: {label} has {count} heads in {path}, and none of number {wrong[0]}")
