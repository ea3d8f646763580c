"""Merging pretrained adapters of one site into one (MerA: He et al., 2023, arXiv:2308.15982).

Four stages, each a part of the recipe: canonicalise (fold the scaling; balance neurons where the nonlinearity lets
scales pass), align (equations 3 and 4), combine (equations 1, 2 and 5) and repair. What each takes from the paper, and
where it leaves it, is said in its module: :mod:`~peft_lightning.functional.neurons`,
:mod:`~peft_lightning.functional.aligning`, :mod:`~peft_lightning.functional.combining` and
:mod:`~peft_lightning.functional.repairing`.

A repair of an aligned merge needs the merged neurons' activations, which nobody has before the merge: :func:`merge`
does all but that, and :func:`~peft_lightning.functional.repairing.refit` is called after a second pass over the data
(``Recipe.needs`` names it). ``select`` keeps neurons that have been seen and is repaired at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.aligning import Alignment, Products, align
from peft_lightning.functional.combining import combine, output_weights, prune
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import HOMOGENEOUS, Bottleneck, canonicalise, carry, check_sources
from peft_lightning.functional.recipes import Recipe
from peft_lightning.functional.repairing import refit, select

__all__ = ["Merge", "merge"]


@dataclass(frozen=True)
class Merge:
    """A merged adapter and how it came about.

    Attributes:
        bottleneck: the adapter, scaling 1, in fp32 at least.
        outputs: v: the factors of the sources' outputs in what it stands for.
        alignment: where the sources' neurons went; None for ``select``.
        chosen_R: for ``select``, int64: which of all sources' neurons these are; else None.
        norm_ratio: norm of the merged matrices over the mean norm of the sources'.
    """

    bottleneck: Bottleneck
    outputs: tuple[float, ...]
    alignment: Alignment | None
    chosen_R: Tensor | None
    norm_ratio: float


@torch.no_grad()
def merge(
    sources: Sequence[Bottleneck],
    recipe: Recipe,
    *,
    weights: Sequence[float] | None = None,
    nonlinearity: str = "relu",
    pre: Moments | None = None,
    post: Moments | None = None,
    input_grams: Sequence[Tensor] | None = None,
) -> Merge:
    """Merge the adapters of one site.

    Args:
        sources: at least one, for one model width and on one device; numbers of neurons may differ.
        recipe: the settings.
        weights: w, of either sign; None: 1 each.
        nonlinearity: of all sources; decides whether neurons can be balanced.
        pre: moments of the sources' activations before the nonlinearity, where ``recipe.needs`` names them.
        post: of those after it.
        input_grams: for RegMean, for each source ``[D, D]`` mean products of its inputs.

    Returns:
        The merge, but for the repair of an aligned one.

    Raises:
        UsageError: if sources do not fit, or moments are missing or belong to other adapters.
    """
    check_sources(sources)
    weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(sources):
        raise UsageError(f"merge.weights = {weights}: must be {len(sources)}, one for each adapter")
    outputs = output_weights(weights, recipe.scale)
    balance = recipe.balance and nonlinearity in HOMOGENEOUS
    plain, factors = zip(*(canonicalise(source, balance=balance) for source in sources), strict=True)
    if post is None and recipe.combine in ("regmean", "select"):
        raise UsageError(f"merge.combine = {recipe.combine!r} needs the moments of activations")
    kept = None
    if recipe.masks == "budget":
        kept = recipe.budget or round(sum(source.kept for source in sources) / len(sources))
    if recipe.combine == "select":
        assert post is not None
        width = recipe.width or max(source.size for source in sources)
        found, chosen_R = select(plain, outputs, post, width, choice=recipe.choice, factors=factors)
        merged = prune(found, [found], kept)
        if recipe.repair == "refit":
            merged = refit(merged, plain, outputs, post, recipe.ridge, chosen_R=chosen_R, factors=factors)
        return Merge(merged, tuple(outputs), None, chosen_R, _norm_ratio(merged, plain))
    sizes = [source.size for source in plain]
    alignment = align(sizes, recipe, None if recipe.align == "none" else Products.of(plain, recipe, pre, factors))
    moved = [carry(source, plan, alignment.slots) for source, plan in zip(plain, alignment.plans, strict=True)]
    aligned, owned_nT = [adapter for adapter, _ in moved], torch.stack([owned_T for _, owned_T in moved])
    grams = _slot_grams(post, factors, alignment) if recipe.combine == "regmean" else None
    merged = prune(combine(aligned, owned_nT, weights, recipe, grams, input_grams), aligned, kept)
    return Merge(merged, tuple(outputs), alignment, None, _norm_ratio(merged, plain))


def _slot_grams(post: Moments | None, factors: Sequence[Tensor], alignment: Alignment) -> list[Tensor]:
    """Products of each source's activations in the slots they went to."""
    sizes = tuple(len(factor) for factor in factors)
    if post is None or post.sizes != sizes:
        raise UsageError(f"merge.combine = 'regmean' needs moments of {sizes} neurons")
    factor_M = torch.cat([factor.cpu().double() for factor in factors])
    second_MM = post.second() * factor_M[:, None] * factor_M
    grams, start = [], 0
    for size, plan in zip(sizes, alignment.plans, strict=True):
        into_TS = plan.incoming(alignment.slots)
        grams.append(into_TS @ second_MM[start : start + size, start : start + size] @ into_TS.t())
        start += size
    return grams


def _norm_ratio(merged: Bottleneck, sources: Sequence[Bottleneck]) -> float:
    norms = []
    for adapter in (merged, *sources):
        sides = torch.stack([torch.linalg.vector_norm(side) for side in (adapter.down_RD, adapter.up_DR)])
        norms.append(float(torch.linalg.vector_norm(sides)))
    return norms[0] * len(sources) / (sum(norms[1:]) or 1.0)
