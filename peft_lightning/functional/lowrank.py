"""Merging LoRA updates, dW = s B A (He et al., 2023, do not; exact where peers are not).

A and B are never merged apart: that adds products of one adapter's B with another's A, and a rank has no identity (B A
is the same after any invertible change of basis between the two), so that there is nothing to align.

* cat: the ranks stand side by side; the weighted sum exactly, at the sum of the ranks.
* svd: that, cut to a rank by the singular value decomposition, which is the closest (Eckart and Young, 1936). It is
  taken in factor space: with B = Q_B R_B and A' = Q_A R_A only R_B R_A', of the sum of the ranks, is decomposed.
* ties (Yadav et al., 2023) and dare (Yu et al., 2024) change entries of dW itself. What they give has no low rank; it
  is cut to one, and the share that is lost is returned. Both hold every dW at full size.

Shapes: O output width, D input width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.combining import mean_factor, output_weights, ties

__all__ = ["UPDATE_METHODS", "LowRank", "concatenate", "merge_updates", "truncate"]

UPDATE_METHODS = ("cat", "svd", "ties", "dare")
"""Ways to merge updates."""


@dataclass(frozen=True)
class LowRank:
    """A LoRA adapter of one linear map.

    Raises:
        UsageError: if the ranks of the two matrices differ.
    """

    a_RD: Tensor
    b_OR: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.a_RD.ndim != 2 or self.b_OR.ndim != 2 or self.a_RD.shape[0] != self.b_OR.shape[1]:
            raise UsageError(
                f"A of shape {tuple(self.a_RD.shape)} and B of shape {tuple(self.b_OR.shape)} have no rank"
            )

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RD.shape[0]

    def dense(self) -> Tensor:
        """dW, ``[O, D]``, in fp32 at least."""
        dtype = torch.promote_types(self.a_RD.dtype, torch.float32)
        return self.b_OR.to(dtype) @ self.a_RD.to(dtype) * self.scaling


@torch.no_grad()
def merge_updates(
    updates: Sequence[LowRank],
    method: str = "cat",
    *,
    weights: Sequence[float] | None = None,
    scale: str | float = "mean",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> tuple[LowRank, float]:
    """Merge the updates of one linear map.

    Args:
        updates: at least one; ranks may differ.
        method: one of :data:`UPDATE_METHODS`.
        weights: of either sign; None: 1 each.
        scale: mean, sum, or a factor of the mean.
        rank: of the result; None: the largest of theirs. ``cat`` takes none.
        density: share of entries that TIES and DARE keep.
        seed: of DARE's draws.

    Returns:
        The merged update, scaling 1, in fp32 at least; and what the cut to the rank lost: norm over norm.

    Raises:
        UsageError: if a setting is not allowed or the updates are of different maps.
    """
    if method not in UPDATE_METHODS:
        raise UsageError(f"merge.method = {method!r}: must be one of {', '.join(UPDATE_METHODS)}")
    if rank is not None and (method == "cat" or rank < 1):
        raise UsageError(f"merge.rank = {rank}: must be at least 1, and cat takes none")
    if not 0 < density <= 1:
        raise UsageError(f"merge.density = {density}: must be above 0 and at most 1")
    weights = [1.0] * len(updates) if weights is None else [float(weight) for weight in weights]
    outputs = output_weights(weights, scale)
    if method == "cat":
        return concatenate(updates, outputs), 0.0
    rank = max(update.rank for update in updates) if rank is None else rank
    if method == "svd":
        return truncate(concatenate(updates, outputs), rank)
    _check_maps(updates, outputs)
    values = [update.dense() for update in updates]
    if method == "ties":
        return _cut(ties(values, weights, density) * mean_factor(weights, scale), rank)
    return _cut(_dare(values, outputs, density, seed), rank)


@torch.no_grad()
def concatenate(updates: Sequence[LowRank], outputs: Sequence[float]) -> LowRank:
    """The weighted sum of updates, exactly; its rank is the sum of theirs.

    Args:
        updates: of one linear map.
        outputs: factor of each.

    Returns:
        An update with scaling 1, in fp32 at least. Entries of A stay as they are; zeros of masks stay zeros.

    Raises:
        UsageError: if there is none, or they are of different maps.

    >>> one = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), scaling=2.0)
    >>> concatenate([one, one], [1.0, -0.5]).dense().tolist()
    [[3.0, 6.0]]
    """
    _check_maps(updates, outputs)
    dtype = torch.promote_types(updates[0].a_RD.dtype, torch.float32)
    pairs = zip(updates, outputs, strict=True)
    return LowRank(
        torch.cat([update.a_RD.to(dtype) for update in updates]),
        torch.cat([update.b_OR.to(dtype) * (update.scaling * factor) for update, factor in pairs], 1),
    )


@torch.no_grad()
def truncate(update: LowRank, rank: int) -> tuple[LowRank, float]:
    """The closest update of at most a given rank.

    Args:
        update: of any rank.
        rank: at least 1.

    Returns:
        The update, scaling 1, both factors of equal norms; its rank is no higher than the given one's. And
        ``|dW - result| / |dW|``.
    """
    q_b, r_b = torch.linalg.qr(update.b_OR.double() * update.scaling)
    q_a, r_a = torch.linalg.qr(update.a_RD.t().double())
    u_KS, s_S, v_SL = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    dtype = torch.promote_types(update.a_RD.dtype, torch.float32)
    return _factors(q_b @ u_KS, s_S, v_SL @ q_a.t(), rank, dtype)


def _cut(dense_OD: Tensor, rank: int) -> tuple[LowRank, float]:
    u_OS, s_S, v_SD = torch.linalg.svd(dense_OD, full_matrices=False)
    return _factors(u_OS, s_S, v_SD, rank, dense_OD.dtype)


def _factors(u_OS: Tensor, s_S: Tensor, v_SD: Tensor, rank: int, dtype: torch.dtype) -> tuple[LowRank, float]:
    root_R = s_S[:rank].sqrt()
    whole = float(torch.linalg.vector_norm(s_S))
    lost = float(torch.linalg.vector_norm(s_S[rank:])) / whole if whole else 0.0
    return LowRank((root_R[:, None] * v_SD[:rank]).to(dtype), (u_OS[:, :rank] * root_R).to(dtype)), lost


def _dare(values: Sequence[Tensor], outputs: Sequence[float], density: float, seed: int) -> Tensor:
    """Weighted sum of updates of which a random share of entries is kept and made larger for it."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(values[0])
    for value, factor in zip(values, outputs, strict=True):
        kept = (torch.rand(value.shape, generator=generator) < density).to(value.device)
        total += value * kept * (factor / density)
    return total


def _check_maps(updates: Sequence[LowRank], outputs: Sequence[float]) -> None:
    shapes = [(update.b_OR.shape[0], update.a_RD.shape[1]) for update in updates]
    if len(set(shapes)) != 1 or len(outputs) != len(updates):
        raise UsageError(f"updates of shapes {shapes} with {len(outputs)} weights: must be of one linear map")
