"""From scores to binary masks with exact counts (SparseAdapter, algorithm 1: He et al., 2022, arXiv:2210.04284).

Symbols: ``z`` = scores, ``s`` = sparsity (the share *removed*), ``m`` = masks. The paper keeps every entry whose
score reaches the s-th percentile. We deviate in one point: a percentile keeps or drops all ties together, so the
count depends on the data; here exactly ``N - round(s N)`` entries stay, and ties are drawn by a seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_lightning.errors import PeftLightningError, UsageError

__all__ = ["DegenerateScoreError", "kept_count", "top_masks"]


class DegenerateScoreError(PeftLightningError):
    """Scores that cannot rank anything (all equal, not finite), or a tensor that a mask would empty."""


def kept_count(total: int, sparsity: float) -> int:
    """Number of entries that stay when the share ``sparsity`` of ``total`` is removed.

    Raises:
        UsageError: if ``sparsity`` lies outside [0, 1).

    >>> kept_count(10, 0.4)
    6
    """
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity = {sparsity}: must be the share removed, at least 0 and below 1")
    return total - round(sparsity * total)


def top_masks(
    scores: Mapping[str, Tensor], sparsity: float, *, scope: str = "global", seed: int = 0
) -> dict[str, Tensor]:
    """Keep the highest scores: over all tensors together or inside each tensor.

    Args:
        scores: name -> scores of any shape, finite, on any device; compared in fp32.
        sparsity: share removed, in [0, 1).
        scope: ``"global"`` ranks all entries together, ``"tensor"`` ranks within each tensor.
        seed: decides which of several equal scores stay.

    Returns:
        name -> bool mask of the same shape and device; True = kept. The number of True entries is exactly
        :func:`kept_count` of the entries ranked together.

    Raises:
        UsageError: if ``sparsity`` or ``scope`` is not allowed.
        DegenerateScoreError: if scores are not finite or all equal, or if a tensor keeps nothing.
    """
    if scope not in ("global", "tensor"):
        raise UsageError(f"scope = {scope!r}: must be 'global' or 'tensor'")
    if not scores:
        raise UsageError("there is no tensor to prune")
    if sparsity == 0.0:
        return {name: torch.ones_like(z, dtype=torch.bool) for name, z in scores.items()}
    flat = {name: z.detach().to("cpu", torch.float32).flatten() for name, z in scores.items()}
    for name, z_N in flat.items():
        if not torch.isfinite(z_N).all():
            raise DegenerateScoreError(
                f"{name}: {int((~torch.isfinite(z_N)).sum())} of {z_N.numel()} scores are not finite; "
                "lower the learning rate of what came before, score in fp32, or use score = magnitude"
            )
    generator = torch.Generator().manual_seed(seed)
    groups = [list(flat)] if scope == "global" else [[name] for name in flat]
    kept_flat: dict[str, Tensor] = {}
    for names in groups:
        kept_flat |= _top_group({name: flat[name] for name in names}, sparsity, generator)
    for name, kept_N in kept_flat.items():
        if not kept_N.any():
            raise DegenerateScoreError(
                f"{name}: no weight of it would stay at sparsity {sparsity}; lower the sparsity, rank per tensor "
                "(scope = tensor) or initialise this tensor away from zero"
            )
    return {name: kept_flat[name].view(z.shape).to(z.device) for name, z in scores.items()}


def _top_group(flat: Mapping[str, Tensor], sparsity: float, generator: torch.Generator) -> dict[str, Tensor]:
    z_N = torch.cat(list(flat.values()))
    if z_N.numel() > 1 and bool((z_N == z_N[0]).all()):
        raise DegenerateScoreError(
            f"{', '.join(flat)}: all {z_N.numel()} scores equal {z_N[0].item():g}, so they rank nothing; "
            "initialise these tensors away from zero or score on data that gives a gradient"
        )
    shuffled_N = torch.randperm(z_N.numel(), generator=generator)
    order_N = shuffled_N[torch.argsort(z_N[shuffled_N], descending=True, stable=True)]
    kept_N = torch.zeros(z_N.numel(), dtype=torch.bool)
    kept_N[order_N[: kept_count(z_N.numel(), sparsity)]] = True
    return dict(zip(flat, kept_N.split([z.numel() for z in flat.values()]), strict=True))
