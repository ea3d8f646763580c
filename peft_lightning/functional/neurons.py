"""A bottleneck adapter at one site as plain tensors, and what may be done to its neurons without changing it.

    f(x) = c (W_up a(W_down x + b_down) + b_up)

Its neurons may change places, and under a positively homogeneous nonlinearity (``a(s z) = s a(z)`` for s > 0, as ReLU)
their scale may move from one side to the other. The paper does neither scale nor bias; both matter to which neurons
look alike.

Shapes: D model width, R neurons, T slots of the merged adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.transport import Plan

__all__ = ["HOMOGENEOUS", "Bottleneck", "canonicalise", "carry", "check_sources"]

HOMOGENEOUS = ("relu", "leaky_relu", "identity")
"""Nonlinearities that let a positive factor pass."""


@dataclass(frozen=True)
class Bottleneck:
    """An adapter of one site. Masks are bool, True = kept.

    Raises:
        UsageError: if shapes do not fit.
    """

    down_RD: Tensor
    down_bias_R: Tensor | None
    up_DR: Tensor
    up_bias_D: Tensor | None
    scaling: float = 1.0
    down_mask_RD: Tensor | None = None
    up_mask_DR: Tensor | None = None

    def __post_init__(self) -> None:
        size, width = self.down_RD.shape
        wanted = {
            "down_bias_R": (size,),
            "up_DR": (width, size),
            "up_bias_D": (width,),
            "down_mask_RD": (size, width),
            "up_mask_DR": (width, size),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise UsageError(f"{name} has shape {tuple(tensor.shape)}: must be {shape} beside {(size, width)}")
        if (self.down_mask_RD is None) != (self.up_mask_DR is None):
            raise UsageError("a sparse adapter must have masks of both matrices")

    @property
    def size(self) -> int:
        """R."""
        return self.down_RD.shape[0]

    @property
    def kept(self) -> int:
        """Entries of both matrices that masks keep."""
        if self.down_mask_RD is None or self.up_mask_DR is None:
            return self.down_RD.numel() + self.up_DR.numel()
        return int(self.down_mask_RD.sum()) + int(self.up_mask_DR.sum())


def check_sources(sources: Sequence[Bottleneck]) -> None:
    """Adapters that can be merged at all.

    Raises:
        UsageError: if there is none, or they are made for different model widths.
    """
    widths = [source.down_RD.shape[1] for source in sources]
    if len(set(widths)) != 1:
        raise UsageError(f"adapters for model widths {widths}: there must be at least one, and all for the same")


@torch.no_grad()
def canonicalise(source: Bottleneck, *, balance: bool = False) -> tuple[Bottleneck, Tensor]:
    """The same function with scaling 1, masked entries zero and, if asked for, balanced neurons.

    Args:
        source: an adapter of any float dtype.
        balance: give each neuron's incoming weights with bias, and its outgoing weights, the same norm. Exact for
            nonlinearities in :data:`HOMOGENEOUS` only. Neurons with a norm of zero stay as they are.

    Returns:
        The adapter in fp32 at least; and ``[R]`` by what each neuron's (pre-)activation has been multiplied.
    """
    dtype = torch.promote_types(source.down_RD.dtype, torch.float32)
    down_RD, up_DR = source.down_RD.to(dtype), source.up_DR.to(dtype)
    if source.down_mask_RD is not None and source.up_mask_DR is not None:
        down_RD, up_DR = down_RD * source.down_mask_RD, up_DR * source.up_mask_DR
    bias_R = None if source.down_bias_R is None else source.down_bias_R.to(dtype)
    up_bias_D = None if source.up_bias_D is None else source.up_bias_D.to(dtype)
    if source.scaling != 1:
        up_DR = up_DR * source.scaling
        up_bias_D = None if up_bias_D is None else up_bias_D * source.scaling
    factor_R = down_RD.new_ones(source.size)
    if balance:
        incoming_R = down_RD.square().sum(1) + (0 if bias_R is None else bias_R.square())
        ratio_R = (up_DR.square().sum(0) / incoming_R) ** 0.25
        factor_R = torch.where(torch.isfinite(ratio_R) & (ratio_R > 0), ratio_R, 1.0)
        down_RD, up_DR = down_RD * factor_R[:, None], up_DR / factor_R
        bias_R = None if bias_R is None else bias_R * factor_R
    plain = replace(source, down_RD=down_RD, down_bias_R=bias_R, up_DR=up_DR, up_bias_D=up_bias_D, scaling=1.0)
    return plain, factor_R


def carry(source: Bottleneck, plan: Plan, slots: int) -> tuple[Bottleneck, Tensor]:
    """Put an adapter's neurons where a plan wants them (equation 4).

    Args:
        source: with scaling 1.
        plan: of its neurons.
        slots: T, at least as many as the plan speaks of.

    Returns:
        The adapter with T neurons; and bool ``[T]``, which slots got something. Where the plan is one to one the
        function is the same: empty slots are zero.
    """
    device = source.down_RD.device
    if plan.slots_S is not None:
        slots_R = plan.slots_S.to(device)
        places_R = torch.arange(source.size, device=device)
        if slots == source.size and torch.equal(slots_R, places_R):
            return source, places_R >= 0
        from_T = torch.full((slots,), source.size, device=device).index_copy_(0, slots_R, places_R)
        moved = replace(
            source,
            down_RD=_gather(source.down_RD, 0, from_T),
            down_bias_R=_gather(source.down_bias_R, 0, from_T),
            up_DR=_gather(source.up_DR, 1, from_T),
            down_mask_RD=_gather(source.down_mask_RD, 0, from_T),
            up_mask_DR=_gather(source.up_mask_DR, 1, from_T),
        )
        return moved, from_T < source.size
    into_TR, out_RT = plan.incoming(slots).to(source.down_RD), plan.outgoing(slots).to(source.down_RD)
    down_mask_RD, up_mask_DR = source.down_mask_RD, source.up_mask_DR
    moved = replace(
        source,
        down_RD=into_TR @ source.down_RD,
        down_bias_R=None if source.down_bias_R is None else into_TR @ source.down_bias_R,
        up_DR=source.up_DR @ out_RT,
        down_mask_RD=None if down_mask_RD is None else into_TR @ down_mask_RD.to(into_TR) > 0,
        up_mask_DR=None if up_mask_DR is None else up_mask_DR.to(out_RT) @ out_RT > 0,
    )
    return moved, into_TR.any(1)


@overload
def _gather(values: Tensor, dim: int, from_T: Tensor) -> Tensor: ...
@overload
def _gather(values: None, dim: int, from_T: Tensor) -> None: ...
@overload
def _gather(values: Tensor | None, dim: int, from_T: Tensor) -> Tensor | None: ...
def _gather(values: Tensor | None, dim: int, from_T: Tensor) -> Tensor | None:
    """Entries along a dimension; the place behind the last one holds zeros."""
    if values is None:
        return None
    if len(from_T) != values.shape[dim]:
        shape = list(values.shape)
        shape[dim] = 1
        values = torch.cat([values, values.new_zeros(shape)], dim)
    return values.index_select(dim, from_T)
