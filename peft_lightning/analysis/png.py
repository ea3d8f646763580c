"""Figures as PNG files, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from peft_lightning.atomic import atomic_write

__all__ = ["save_png"]


def save_png(figure: Any, path: str | Path) -> None:
    """Write a figure of matplotlib.

    Args:
        figure: what was drawn.
        path: the PNG to write.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    atomic_write(path, lambda file: file.write(picture.getvalue()))
