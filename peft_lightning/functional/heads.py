"""How much the loss depends on each head, neuron or block (Prune-LoRA, equations 1 and 2; Michel et al., 2019).

Symbols: ``xi`` = gates, 1 for every unit of every example; the loss l_b of example b is computed with each unit's
output multiplied by its gate, and

    I_u = sum_b |d l_b / d xi_bu| / tokens,   I'_u = I_u / (||I||_2 + eps),   I_u final = (I' - min) / (max - min)

A gate for each *example* makes one backward pass over a batch of B give what B passes over one example each would. A
unit is what is removed as one piece: W neighbouring columns of a block's output. The paper's reference code (which its
equations match) takes the norm inside each layer, and minimum and maximum over all layers; with the norm over all heads
the order is that of I itself. Deviations: an importance that ranks nothing (all equal, or not finite) is an error.

Shapes: B examples, L tokens, U units, W columns of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_lightning.errors import UsageError
from peft_lightning.functional.sparsify import DegenerateScoreError

__all__ = ["NORMS", "gate_units", "normalise", "rank_correlation"]

NORMS = ("layer", "all")
"""Over what the L2 norm is taken: the units of a layer, or all of them."""

_EPS = 1e-20
_SPREAD = 1e-9  # of the largest; less is rounding


def gate_units(value: Tensor, gates: Tensor) -> Tensor:
    """Multiply units by gates that are 1: nothing changes but that the gates get their gradients.

    Args:
        value: ``[B, L, U * W]``, what the units of a block give, side by side.
        gates: ``[B, U]`` ones that require a gradient.

    Returns:
        ``value``, through which ``gates`` get d loss / d xi ``[B, U]``. It can be differentiated once.
    """
    result: Tensor = _Gate.apply(value, gates)
    return result


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_BLN: Tensor, gates_BU: Tensor) -> Tensor:
        ctx.save_for_backward(value_BLN)
        ctx.units = gates_BU.shape[1]
        return value_BLN.view_as(value_BLN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_BLN: Tensor) -> tuple[Tensor, Tensor]:
        (value_BLN,) = ctx.saved_tensors
        # d loss / d xi_u = sum over a unit's entries of entry times slope, at xi = 1
        products_BN = (value_BLN * slope_BLN).sum(1)
        return slope_BLN, products_BN.unflatten(1, (ctx.units, -1)).sum(2)


def normalise(raw: Mapping[str, Tensor], norm: str) -> dict[str, Tensor]:
    """Equation 2: L2 norm, then minimum and maximum over all units.

    Args:
        raw: layer -> I ``[U]``, at least 0; layers may have different numbers of units, also none.
        norm: one of :data:`NORMS`.

    Returns:
        layer -> importance ``[U]`` fp64 on the CPU: 0 for the least important unit of all, 1 for the most.

    Raises:
        UsageError: if the norm is unknown or there is no unit.
        DegenerateScoreError: if a value is not finite, or all are equal.

    >>> normalise({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 9.0])}, "layer")["a"].tolist()
    [0.6, 0.8]
    """
    if norm not in NORMS:
        raise UsageError(f"importance.norm = {norm!r}: must be one of {', '.join(NORMS)}")
    values = {layer: tensor.detach().double().cpu() for layer, tensor in raw.items()}
    everything = torch.cat([*values.values(), torch.empty(0, dtype=torch.float64)])
    if not everything.numel():
        raise UsageError("importance: there is no unit to rank")
    if not torch.isfinite(everything).all():
        raise DegenerateScoreError("importance: a value is not finite; the loss or a gradient has overflowed")
    whole = everything.norm()
    if not torch.isfinite(whole):
        raise DegenerateScoreError("importance: its values are too large to be compared")
    scaled = {
        layer: tensor / ((tensor.norm() if norm == "layer" else whole) + _EPS) for layer, tensor in values.items()
    }
    scores = torch.cat(list(scaled.values()))
    low, high = scores.min(), scores.max()
    if high - low <= _SPREAD * high:
        single = norm == "layer" and len(scores) > 1 and all(len(tensor) < 2 for tensor in values.values())
        one = "; with one a layer, importance.norm all can rank them" if single else ""
        raise DegenerateScoreError(f"importance: all {len(scores)} units have the same, so nothing can be ranked{one}")
    return {layer: (tensor - low) / (high - low) for layer, tensor in scaled.items()}


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation: 1 for the same order, about 0 for orders that know nothing of each other.

    Args:
        one: ``[U]`` values.
        other: ``[U]`` values of the same units. Equal values share the mean of their ranks.

    Returns:
        A number from -1 to 1; NaN where one of the two has no order, all its values being equal.

    Raises:
        UsageError: if the shapes differ or there are fewer than two units.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 9.0, 4.0]))
    0.5
    """
    if one.shape != other.shape or one.ndim != 1 or len(one) < 2:
        raise UsageError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}: must be equal, of two units or more")
    a, b = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    return round(float((a * b).sum() / (a.norm() * b.norm())), 12)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, fp64; equal values share the mean of theirs."""
    _, where, counts = values.detach().double().cpu().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts.double() - 1) / 2)[where]
