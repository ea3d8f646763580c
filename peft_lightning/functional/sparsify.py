"""From scores to binary masks with exact counts (SparseAdapter, algorithm 1: He et al., 2022, arXiv:2210.04284).

Symbols: ``z`` = scores, ``s`` = sparsity (the share *removed*), ``m`` = masks, N = all entries. The paper keeps every
entry whose score reaches the s-th percentile. We deviate in one point: a percentile keeps or drops all ties together,
so the count depends on the data; here exactly as many stay as asked for, and ties are drawn by a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from peft_lightning.errors import PeftLightningError, UsageError

__all__ = ["DegenerateScoreError", "erdos_renyi_counts", "kept_count", "top_masks"]


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
        raise UsageError(f"prune.sparsity = {sparsity}: must be the share removed, at least 0 and below 1")
    return total - round(sparsity * total)


def erdos_renyi_counts(shapes: Mapping[str, tuple[int, ...]], kept: int) -> dict[str, int]:
    """Share ``kept`` entries out over tensors as Erdos-Renyi graphs would have them (Mocanu et al., 2018).

    The density of an n_out x n_in matrix is proportional to (n_in + n_out) / (n_in n_out) and at most 1; what a full
    matrix cannot take goes to the others, in the same proportions. Tensors of equal shape get equal counts (but for
    the last unit), so for these it is the uniform share.

    Args:
        shapes: name -> shape; for another number of dimensions than 2, sum over product.
        kept: entries to keep over all tensors.

    Returns:
        name -> entries to keep. The sum is exactly ``kept``: shares are rounded down and the largest remainders get
        one more, the first named where remainders are equal.

    Raises:
        UsageError: if there is no tensor, or ``kept`` lies outside 1 .. N.
        DegenerateScoreError: if a tensor would keep nothing.

    >>> erdos_renyi_counts({"square": (4, 4), "flat": (1, 16)}, 16)
    {'square': 5, 'flat': 11}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    _check_kept("kept", kept, sum(sizes.values()))
    full: set[str] = set()
    while True:
        rest = Fraction(kept - sum(sizes[name] for name in full))
        ends = sum(sum(shape) for name, shape in shapes.items() if name not in full)
        share = {n: Fraction(sizes[n]) if n in full else rest * sum(shape) / ends for n, shape in shapes.items()}
        over = {name for name in shapes if name not in full and share[name] >= sizes[name]}
        if not over:
            break
        full |= over
    counts = {name: math.floor(value) for name, value in share.items()}
    by_remainder = sorted(shapes, key=lambda name: counts[name] - share[name])
    for name in by_remainder[: kept - sum(counts.values())]:
        counts[name] += 1
    _check_none_empty(counts)
    return counts


def top_masks(scores: Mapping[str, Tensor], kept: int | Mapping[str, int], *, seed: int = 0) -> dict[str, Tensor]:
    """Keep the highest scores: over all tensors together or inside each tensor.

    Args:
        scores: name -> scores of any shape, finite, on any device; compared in fp32.
        kept: entries that stay. A number ranks all tensors together; a mapping, name -> number, each by itself.
        seed: decides which of several equal scores stay.

    Returns:
        name -> bool mask of the same shape and device; True = kept. Exactly ``kept`` entries are True. Where all
        entries stay, the scores are not looked at.

    Raises:
        UsageError: if there is no tensor, ``kept`` is negative or more than there are, or names other tensors.
        DegenerateScoreError: if scores are not finite, all of a tensor's scores (of more than one entry) are equal,
            or a tensor would keep nothing.
    """
    if not scores:
        raise UsageError("there is no tensor to prune")
    flat = {name: z.detach().to("cpu", torch.float32).flatten() for name, z in scores.items()}
    generator = torch.Generator().manual_seed(seed)
    if isinstance(kept, Mapping):
        if set(kept) != set(flat):
            raise UsageError(f"kept names {sorted(kept)}: must name the tensors {sorted(flat)}")
        for name, z_N in flat.items():
            _check_kept(f"kept[{name!r}]", kept[name], z_N.numel(), least=0)
        _check_none_empty(kept)
        masks: dict[str, Tensor] = {}
        for name, z_N in flat.items():
            masks |= _top_group({name: z_N}, kept[name], generator)
    else:
        _check_kept("kept", kept, sum(z_N.numel() for z_N in flat.values()))
        masks = _top_group(flat, kept, generator)
        _check_none_empty({name: int(mask_N.sum()) for name, mask_N in masks.items()})
    return {name: masks[name].view(z.shape).to(z.device) for name, z in scores.items()}


def _top_group(flat: Mapping[str, Tensor], kept: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks of flat tensors that are ranked together."""
    z_N = torch.cat(list(flat.values()))
    kept_N = torch.ones(z_N.numel(), dtype=torch.bool)
    if kept < z_N.numel():
        _check_scores(flat)
        shuffled_N = torch.randperm(z_N.numel(), generator=generator)
        order_N = shuffled_N[torch.argsort(z_N[shuffled_N], descending=True, stable=True)]
        kept_N[order_N[kept:]] = False
    return dict(zip(flat, kept_N.split([z.numel() for z in flat.values()]), strict=True))


def _check_scores(flat: Mapping[str, Tensor]) -> None:
    unsound = {name: int((~torch.isfinite(z_N)).sum()) for name, z_N in flat.items()}
    if any(unsound.values()):
        raise DegenerateScoreError(
            "; ".join(f"{name}: {count} of {flat[name].numel()} scores" for name, count in unsound.items() if count)
            + " are not finite; look at adapter.scaling, adapter.init_std, the data and (in a warm-up) optim.lr, or "
            "use prune.score = magnitude or random"
        )
    equal = [name for name, z_N in flat.items() if z_N.numel() > 1 and bool((z_N == z_N[0]).all())]
    if equal:
        raise DegenerateScoreError(
            "; ".join(f"{name}: all {flat[name].numel()} scores equal {flat[name][0].item():g}" for name in equal[:3])
            + ("; and so on" if len(equal) > 3 else "")
            + ", so they rank nothing: a tensor starts at zero, as LoRA's B does, or no gradient reaches it, as behind "
            "dead units; use prune.score_init = surrogate or warmup, another seed, or prune.score = random"
        )


def _check_kept(what: str, kept: int, total: int, least: int = 1) -> None:
    if not total:
        raise UsageError("there is no tensor to prune")
    if not least <= kept <= total:
        raise UsageError(f"{what} = {kept}: must be from {least} to {total}")


def _check_none_empty(counts: Mapping[str, int]) -> None:
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise DegenerateScoreError(
            f"{', '.join(empty)}: no weight of it would stay; lower prune.sparsity or prune.multiplier, rank per "
            "tensor (prune.scope = tensor), or use another prune.score"
        )
