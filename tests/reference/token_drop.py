"""Token dropping written out plainly, one token set after the other, on transformers' own layers.

Every layer gets the rows that the definition says, as a list of positions; queries that are fewer than keys are had by
computing all rows and throwing the others away, so nothing here depends on the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dropped_pass(bare: Any, ids_BS: Tensor, keep_BK: Tensor) -> tuple[Tensor, Tensor]:
    """All positions of the last layer, and the kept tokens' states before it."""
    layers = bare.encoder.layer
    middle = len(layers) // 2
    x = _embed(bare, ids_BS)
    for layer in layers[: middle - 1]:
        x = layer(x)
    rows = []
    for block, keep in zip(x, keep_BK, strict=True):
        block = block[None]
        y = layers[middle - 1](block)[:, keep]
        for layer in layers[middle:-1]:
            y = layer(y)
        rows.append((y, block))
    merged, kept = [], []
    for (y, block), keep in zip(rows, keep_BK, strict=True):
        pieces = list(block[0].unbind())
        for place, position in enumerate(keep.tolist()):
            pieces[position] = y[0, place]
        merged.append(torch.stack(pieces))
        kept.append(y[0])
    return layers[-1](torch.stack(merged)), torch.stack(kept)


def full_pass(bare: Any, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer, and what enters it."""
    x = _embed(bare, ids_BS)
    for layer in bare.encoder.layer[:-1]:
        x = layer(x)
    return bare.encoder.layer[-1](x), x


def _embed(bare: Any, ids_BS: Tensor) -> Tensor:
    x: Tensor = bare.embeddings(input_ids=ids_BS)
    return bare.embeddings_project(x) if hasattr(bare, "embeddings_project") else x
