"""How many tokens a backbone has positions for."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

__all__ = ["positions"]


def positions(backbone: nn.Module) -> int | None:
    """The most tokens of a text, or None where there is no such limit."""
    embedded = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    if isinstance(embedded, nn.Embedding):
        # RoBERTa counts positions from behind the padding's
        return embedded.num_embeddings - (0 if embedded.padding_idx is None else embedded.padding_idx + 1)
    if hasattr(getattr(backbone, "encoder", None), "embed_positions"):  # BART
        return int(cast(Any, backbone).config.max_position_embeddings)
    return None
