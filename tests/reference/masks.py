"""Slow oracles for masks, counts and derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

Loss = Callable[[Mapping[str, Tensor]], Tensor]


def loop_top_masks(scores: Mapping[str, Tensor], kept: int | Mapping[str, int]) -> set[tuple[str, int]]:
    """The best entries over all tensors, or in each, found by sorting plain Python numbers (no ties expected)."""
    if isinstance(kept, Mapping):
        return {entry for name in scores for entry in loop_top_masks({name: scores[name]}, kept[name])}
    entries = [(float(z), name, i) for name, tensor in scores.items() for i, z in enumerate(tensor.flatten().tolist())]
    entries.sort(key=lambda entry: -entry[0])
    return {(name, i) for _, name, i in entries[:kept]}


def bisected_erdos_renyi(shapes: Mapping[str, tuple[int, ...]], kept: int) -> dict[str, float]:
    """Unrounded shares N * min(1, c * sum(shape) / N) whose sum is ``kept``, by bisection over c."""

    def shares(c: float) -> dict[str, float]:
        return {name: min(float(prod(shape)), c * sum(shape)) for name, shape in shapes.items()}

    low, high = 0.0, float(max(prod(shape) for shape in shapes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle).values()) < kept else (low, middle)
    return shares(high)


def finite_difference(loss: Loss, point: Mapping[str, Tensor], step: float = 1e-5) -> dict[str, Tensor]:
    """dL/dx by central differences, one entry of ``point`` (fp64) at a time."""
    result = {}
    for name, value in point.items():
        slopes = torch.zeros_like(value)
        for i in range(value.numel()):
            values = []
            for sign in (1, -1):
                moved = {key: entry.clone() for key, entry in point.items()}
                moved[name].view(-1)[i] += sign * step
                values.append(float(loss(moved).detach()))
            slopes.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        result[name] = slopes
    return result


def finite_difference_snip(loss: Loss, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|dL/dm| at the given (all-one, fp64) masks."""
    return {name: slopes.abs() for name, slopes in finite_difference(loss, masks).items()}


def finite_difference_flow(loss: Loss, point: Mapping[str, Tensor], step: float = 1e-4) -> dict[str, Tensor]:
    """H g as (g(x + t g) - g(x - t g)) / 2t, with every gradient by central differences."""
    g = finite_difference(loss, point)
    ends = [{name: value + sign * step * g[name] for name, value in point.items()} for sign in (1, -1)]
    up, down = (finite_difference(loss, end) for end in ends)
    return {name: (up[name] - down[name]) / (2 * step) for name in point}
