"""Pictures of what a method decided."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from peft_lightning.atomic import atomic_write

__all__ = ["draw_shares"]


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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, lambda file: file.write(picture.getvalue()))
