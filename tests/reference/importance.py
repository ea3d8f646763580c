"""Importance of heads, neurons and blocks the slow way: one example at a time, through gates that really multiply.

Written from Michel et al. (2019) and the paper's equations 1 and 2; no hook or function of the package is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class Gated(nn.Module):
    """A linear map whose input's units are multiplied by gates first."""

    def __init__(self, linear: nn.Linear, units: int) -> None:
        super().__init__()
        self.linear = linear
        self.gates = nn.Parameter(torch.ones(units, dtype=linear.weight.dtype))

    def forward(self, value: Tensor) -> Tensor:
        width = value.shape[-1] // len(self.gates)
        result: Tensor = self.linear(value * self.gates.repeat_interleave(width))
        return result


def slow_importance(
    backbone: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[Mapping[str, Any]],
    places: Mapping[str, tuple[str, int]],
) -> dict[str, Tensor]:
    """I of every unit, per token.

    Args:
        backbone: is put back as it was.
        loss_of: a batch of one example -> its loss.
        batches: ``inputs`` and ``labels``.
        places: name -> path of the linear map that units enter, and their number.
    """
    gated = {
        name: Gated(cast(nn.Linear, backbone.get_submodule(path)), units) for name, (path, units) in places.items()
    }
    sums = {name: torch.zeros_like(part.gates) for name, part in gated.items()}
    for name, (path, _) in places.items():
        _put(backbone, path, gated[name])
    tokens = 0
    for batch in batches:
        for row in range(len(batch["labels"])):
            one = {
                "inputs": {key: tensor[row : row + 1] for key, tensor in batch["inputs"].items()},
                "labels": batch["labels"][row : row + 1],
            }
            slopes = torch.autograd.grad(loss_of(one), [part.gates for part in gated.values()])
            for name, slope in zip(gated, slopes, strict=True):
                sums[name] += slope.abs()
            tokens += int(one["inputs"]["attention_mask"].sum())
    for name, (path, _) in places.items():
        _put(backbone, path, gated[name].linear)
    return {name: total / tokens for name, total in sums.items()}


def _put(backbone: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(owner), name, module)


def figure_1(raw: Sequence[Sequence[float]], per_layer: bool) -> tuple[list[list[float]], float]:
    """Equation 2 in plain Python, and how far apart lowest and highest were, relative to the highest."""
    rows = [list(map(float, row)) for row in raw]
    whole = sum(value**2 for row in rows for value in row) ** 0.5
    scaled = [[v / (sum(w**2 for w in row) ** 0.5 if per_layer else whole) for v in row] for row in rows]
    low, high = min(min(row) for row in scaled), max(max(row) for row in scaled)
    apart = (high - low) or 1.0
    return [[(value - low) / apart for value in row] for row in scaled], (high - low) / high
