"""One adapter of several that are aligned (MerA, equations 1, 2 and 5, and what came after it).

Symbols: ``w`` = weights of the adapters, of either sign; ``v`` = what the output stands for, sum_j v_j f_j.

* sum, equation 1: both matrices added, down projections by |w|. The output then grows with the square of the number of
  adapters. That is its own scale, sum; at any other one it is the average.
* average, equations 2 and 5: down projections averaged, each slot over the adapters that own it, by |w|; up
  projections added by v. For weights of one sign that is the paper's average, at the scale ``mean``. A negative weight
  subtracts an adapter's *function* (task arithmetic, Ilharco et al., 2023): the zero of adapters is the zero function,
  which a zero up projection gives, so signs belong there and not on the down projection.
* TIES (Yadav et al., 2023) on the up projections, for the same reason: the largest entries of each, the sign of
  their weighted sum, and the weighted mean of those that have it; down projections averaged.
* RegMean (Jin et al., 2023): the up projection that is closest to each adapter's on that adapter's own
  activations, products of different neurons shrunk as there; the same for the down projection where its inputs'
  products are given, else the average (which it is for equal inputs). A merge of whole backbones gives none: one for
  each adapter and site takes [D, D], 0.9 GB for 8 adapters at 24 sites of width 768, and where all read the bare
  backbone's states they are the same.

Shapes: n adapters, D model width, T slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.functional.recipes import Recipe
from peft_lightning.functional.sparsify import DegenerateScoreError, top_masks

__all__ = ["combine", "mean_factor", "output_weights", "prune", "ties"]

_LARGEST = torch.finfo(torch.float32).max


def output_weights(weights: Sequence[float], scale: str | float) -> list[float]:
    """v: the factor of each adapter's output in what the merged one stands for.

    Args:
        weights: w, at least one of them not zero.
        scale: sum (as they are), mean (divided by the sum of their sizes, so that signs stay), or a factor of the mean.

    Raises:
        UsageError: if a weight is not finite in float32, all are zero, or the scale makes such factors of them.

    >>> output_weights([1.0, -3.0], "mean")
    [0.25, -0.75]
    """
    weights = [float(weight) for weight in weights]
    if not any(weights) or not all(abs(weight) <= _LARGEST for weight in weights):
        raise UsageError(f"merge.weights = {list(weights)}: must be finite in float32, and not all zero")
    if scale == "sum":
        return weights
    size, factor = sum(abs(weight) for weight in weights), 1.0 if isinstance(scale, str) else scale
    if not 0 < abs(factor) <= _LARGEST:
        raise UsageError(f"merge.scale = {scale}: must be sum, mean, or a factor of the mean: finite and not zero")
    return [factor * weight / size for weight in weights]


def mean_factor(weights: Sequence[float], scale: str | float) -> float:
    """What a mean that knows the size of one adapter is multiplied by, as TIES' and RegMean's.

    Args:
        weights: w; the mean has taken account of their signs.
        scale: sum (of the weights' sizes), mean (1), or a factor.
    """
    if scale == "sum":
        return sum(abs(weight) for weight in weights)
    return 1.0 if isinstance(scale, str) else scale


def combine(
    aligned: Sequence[Bottleneck],
    owned_nT: Tensor,
    weights: Sequence[float],
    recipe: Recipe,
    activation_grams: Sequence[Tensor] | None = None,
    input_grams: Sequence[Tensor] | None = None,
) -> Bottleneck:
    """Combine adapters slot by slot.

    Args:
        aligned: canonical adapters of T neurons each.
        owned_nT: bool, which slots each adapter has a neuron in.
        weights: w.
        recipe: sum, average, ties or regmean, and its settings.
        activation_grams: for RegMean, for each adapter ``[T, T]`` products of its activations, zero where it owns none.
        input_grams: for RegMean, for each ``[D, D]`` products of its inputs; None: down projections are averaged.

    Returns:
        The merged adapter, without masks.

    Raises:
        UsageError: if weights, scale or products are unusable.
    """
    outputs = output_weights(weights, recipe.scale)
    sizes = [abs(weight) for weight in weights]
    shares: list[Tensor | float] = [size / sum(sizes) for size in sizes]
    if recipe.combine == "sum" and recipe.scale == "sum":
        shares = list(sizes)  # a slot that an adapter does not own adds zero
    elif not owned_nT.all():
        shares = list(_averaging(owned_nT.to(aligned[0].down_RD), sizes))
    columns = [share if isinstance(share, float) else share[:, None] for share in shares]
    down_TD = _added([adapter.down_RD for adapter in aligned], columns)
    down_bias_T = _added([adapter.down_bias_R for adapter in aligned], shares)
    up_bias_D = _added([adapter.up_bias_D for adapter in aligned], outputs)
    ups = [adapter.up_DR for adapter in aligned]
    if recipe.combine == "ties":
        up_DT = ties(ups, weights, recipe.density) * mean_factor(weights, recipe.scale)
    elif recipe.combine == "regmean":
        if activation_grams is None:
            raise UsageError("merge.combine = 'regmean' needs the moments of activations")
        signed = [up if weight > 0 else -up for up, weight in zip(ups, weights, strict=True)]
        up_DT = _regression_mean(signed, activation_grams, weights, recipe) * mean_factor(weights, recipe.scale)
    else:
        up_DT = _added(ups, outputs)
    if recipe.combine == "regmean" and input_grams is not None:
        pairs = zip(aligned, owned_nT, strict=True)
        downs = [torch.where(owned_T[:, None], adapter.down_RD, down_TD) for adapter, owned_T in pairs]
        down_TD = _regression_mean(downs, input_grams, weights, recipe)
    return Bottleneck(down_TD, down_bias_T, up_DT, up_bias_D)


def ties(values: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES: trim, elect signs, average what agrees (Yadav et al., 2023, section 3.2).

    Args:
        values: tensors of one shape.
        weights: w; the sign is elected on weighted values, and the mean divides by the weights of those that agree.
        density: share of entries that stay of each tensor, those of largest size; a zero never counts.

    Returns:
        The mean; its size is that of one tensor.

    >>> ties([torch.tensor([4.0, 1.0]), torch.tensor([-2.0, 3.0])], [1.0, 1.0], 1.0).tolist()
    [4.0, 2.0]
    """
    kept = [_largest(value, density) for value in values]
    elected = torch.sign(_added(kept, weights))
    total, size = torch.zeros_like(elected), torch.zeros_like(elected)
    for value, weight in zip(kept, weights, strict=True):
        agrees = torch.sign(value * weight) * elected > 0
        total += torch.where(agrees, value * weight, 0.0)
        size += agrees * abs(weight)
    return total / size.where(size > 0, 1.0)


def prune(merged: Bottleneck, aligned: Sequence[Bottleneck], kept: int | None) -> Bottleneck:
    """Give the merged adapter the masks that follow from those of its sources.

    Args:
        merged: T neurons.
        aligned: adapters with T neurons each; one without masks keeps everything.
        kept: of what any of them keeps, so many entries stay, the largest of both matrices together. None: all.

    Returns:
        The adapter with masks, removed entries zero; without masks where nothing is removed.
    """
    if kept is None and any(adapter.down_mask_RD is None for adapter in aligned):
        return replace(merged, down_mask_RD=None, up_mask_DR=None)
    down_mask_TD, up_mask_DT = torch.zeros_like(merged.down_RD, dtype=torch.bool), torch.zeros_like(merged.up_DR) > 0
    for adapter in aligned:
        down_mask_TD |= torch.tensor(True) if adapter.down_mask_RD is None else adapter.down_mask_RD
        up_mask_DT |= torch.tensor(True) if adapter.up_mask_DR is None else adapter.up_mask_DR
    if kept is not None and kept < int(down_mask_TD.sum()) + int(up_mask_DT.sum()):
        size = {"down": merged.down_RD.abs(), "up": merged.up_DR.abs()}
        # what the union removes comes after every entry that it keeps, also after those that happen to be zero
        ranked = {"down": size["down"].where(down_mask_TD, -1.0), "up": size["up"].where(up_mask_DT, -1.0)}
        try:
            masks = top_masks(ranked, kept)
        except DegenerateScoreError as error:
            raise UsageError(f"merge.budget = {kept}: leaves a matrix of the merged adapter without entries") from error
        down_mask_TD, up_mask_DT = masks["down"], masks["up"]
    if down_mask_TD.all() and up_mask_DT.all():
        return replace(merged, down_mask_RD=None, up_mask_DR=None)
    return replace(
        merged,
        down_RD=merged.down_RD * down_mask_TD,
        up_DR=merged.up_DR * up_mask_DT,
        down_mask_RD=down_mask_TD,
        up_mask_DR=up_mask_DT,
    )


@overload
def _added(values: Sequence[Tensor], factors: Sequence[Tensor | float]) -> Tensor: ...
@overload
def _added(values: Sequence[Tensor | None], factors: Sequence[Tensor | float]) -> Tensor | None: ...
def _added(values: Sequence[Tensor | None], factors: Sequence[Tensor | float]) -> Tensor | None:
    """Sum of values times factors; None counts as zero, and nothing but None gives None."""
    total: Tensor | None = None
    for value, factor in zip(values, factors, strict=True):
        if value is not None and total is None:
            total = value * factor
        elif value is not None and total is not None:
            total = total.add_(value, alpha=factor) if isinstance(factor, float) else total.addcmul_(value, factor)
    return total


def _averaging(owned_nT: Tensor, sizes: Sequence[float]) -> Tensor:
    """Shares that add up to 1 over the owners of each slot; equal ones where all owners' weights are zero."""
    share_nT = owned_nT * owned_nT.new_tensor(sizes)[:, None]
    share_nT = torch.where(share_nT.sum(0) > 0, share_nT, owned_nT)
    return share_nT / share_nT.sum(0).clamp(min=1e-30)


def _regression_mean(
    matrices: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], recipe: Recipe
) -> Tensor:
    """sum |w| W G (sum |w| G)^-1 in fp64, pulled towards the plain mean where the inputs say nothing."""
    sizes = [abs(weight) for weight in weights]
    wide = [matrix.cpu().double() for matrix in matrices]
    prior = _added(wide, [size / sum(sizes) for size in sizes])
    total, moved = prior.new_zeros(grams[0].shape), torch.zeros_like(prior)
    for matrix, gram, size in zip(wide, (gram.cpu().double() for gram in grams), sizes, strict=True):
        shrunk = size * (recipe.shrink * gram + (1 - recipe.shrink) * torch.diag(gram.diagonal()))
        total += shrunk
        moved += (matrix - prior) @ shrunk
    total.diagonal().add_(recipe.ridge * float(total.diagonal().mean()) or 1.0)
    return (prior + torch.linalg.solve(total, moved, left=False)).to(matrices[0])


def _largest(values: Tensor, density: float) -> Tensor:
    """The tensor with only its largest entries, at least one."""
    count = max(1, round(density * values.numel()))
    if count >= values.numel():
        return values
    order = values.abs().flatten().topk(count).indices
    flat = torch.zeros_like(values).flatten()
    return flat.index_copy_(0, order, values.flatten()[order]).view_as(values)
