"""Slow oracles for masks and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def loop_top_masks(scores: Mapping[str, Tensor], keep: int) -> set[tuple[str, int]]:
    """The ``keep`` best entries over all tensors, found by sorting plain Python numbers (no ties expected)."""
    entries = [(float(z), name, i) for name, tensor in scores.items() for i, z in enumerate(tensor.flatten().tolist())]
    entries.sort(key=lambda entry: -entry[0])
    return {(name, i) for _, name, i in entries[:keep]}


def finite_difference_snip(
    loss: Callable[[Mapping[str, Tensor]], Tensor], masks: Mapping[str, Tensor], step: float = 1e-5
) -> dict[str, Tensor]:
    """|dL/dm| by central differences, one mask entry at a time, at the given (all-one, fp64) masks."""
    result = {}
    for name, mask in masks.items():
        slopes = torch.zeros_like(mask)
        for i in range(mask.numel()):
            values = []
            for sign in (1, -1):
                moved = {key: value.clone() for key, value in masks.items()}
                moved[name].view(-1)[i] += sign * step
                values.append(float(loss(moved)))
            slopes.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        result[name] = slopes.abs()
    return result
