"""Pictures of what a method decided, in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw_decisions"]


def draw_decisions(summary: Mapping[str, Any], folder: Path) -> None:
    """Draw what a person would rather look at than read.

    Args:
        summary: a module's.
        folder: the run's; gets ``kept_share.png`` (masks), ``heads.png`` (importance) and ``merge.png``, as far as the
            method decides such things.
    """
    if shares := summary.get("kept_share_by_matrix"):
        from peft_lightning.analysis.plots import draw_shares

        draw_shares(shares, folder / "kept_share.png")
    if heads := summary.get("importance"):
        from peft_lightning.analysis.heatmap import draw_heads

        kept, task = summary["heads_kept"], summary["task"]
        gone = {path: sorted(set(range(len(scores))) - set(kept[path])) for path, scores in heads.items()}
        title = f"importance of {summary['importance_examples']:,} examples\ncrosses: removed"
        draw_heads({task: heads}, folder / "heads.png", title=title, gone={task: gone})
    if merged := summary.get("merged"):
        from peft_lightning.analysis.merging import draw_merge

        draw_merge(merged, folder / "merge.png")
