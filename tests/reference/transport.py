"""Slow oracles for costs, plans and moments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor


def broadcast_cost(source_SF: Tensor, target_TF: Tensor, metric: str) -> Tensor:
    """Costs from all differences, ``[S, T, F]`` (or products, one pair at a time)."""
    if metric == "inner":
        return torch.tensor([[-float(one @ other) for other in target_TF] for one in source_SF], dtype=torch.float64)
    squared_ST = (source_SF[:, None] - target_TF[None]).double().square().sum(2)
    return squared_ST if metric == "squared" else squared_ST.sqrt()


def cheapest_assignment(cost_ST: Tensor) -> float:
    """Least total cost of giving each source a slot of its own, by trying every way (S <= T, T small)."""
    sources, slots = cost_ST.shape
    rows = range(sources)
    return min(sum(float(cost_ST[i, way[i]]) for i in rows) for way in permutations(range(slots), sources))


def loop_second(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of f f' and of f over tokens, one token at a time, fp64; features ``[N, R]`` of each adapter."""
    rows = torch.cat([part.double() for part in features], 1)
    second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    mean = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        second += torch.outer(row, row)
        mean += row
    return second / len(rows), mean / len(rows)
