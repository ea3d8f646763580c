"""What a merge says of itself, site by site, in plain values that JSON can hold; what is unknown is None.

Output errors are relative: sqrt(E|f - Y|^2 / E|Y|^2) over calibration tokens, where f is what the merged adapter adds
to the hidden states and Y the weighted mean of what the adapters add, or what the recipe's scale makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from peft_lightning.functional.combining import output_weights
from peft_lightning.functional.lowrank import LowRank, concatenate
from peft_lightning.functional.merging import Merge
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.functional.recipes import Recipe
from peft_lightning.functional.repairing import output_error

__all__ = ["describe_bottleneck", "describe_update", "heading", "output_errors"]


def heading(
    names: Sequence[str], weights: Sequence[float], outputs: Sequence[float], recipe: Recipe | Mapping[str, Any]
) -> dict[str, Any]:
    """What holds for all sites: the adapters, their weights, what the output stands for, and all stages' settings."""
    stages = asdict(recipe) if isinstance(recipe, Recipe) else dict(recipe)
    return {"sources": list(names), "weights": list(weights), "outputs": list(outputs), "recipe": stages}


def describe_bottleneck(merge: Merge, sources: Sequence[Bottleneck], names: Sequence[str]) -> dict[str, Any]:
    """The figures of one site that need no data.

    Args:
        merge: with its repair.
        sources: the adapters.
        names: theirs.

    Returns:
        ``cost`` and ``cosine`` of the matched neurons of each adapter and the ``reference``'s name; for ``select``
        ``kept``, how many neurons of each; ``norm_ratio``, and the merged adapter's number of neurons.
    """
    found: dict[str, Any] = {"neurons": merge.bottleneck.size, "norm_ratio": _finite(merge.norm_ratio)}
    alignment = merge.alignment
    if alignment is not None and not math.isnan(alignment.costs[alignment.reference]):
        found["reference"] = names[alignment.reference]
        found["cost"] = [_finite(cost) for cost in alignment.costs]
        found["cosine"] = [_finite(cosine) for cosine in alignment.cosines]
        residual = max(plan.residual for plan in alignment.plans)
        if residual:
            found["marginal_residual"] = _finite(residual)
    if merge.chosen_R is not None:
        owner_M = torch.repeat_interleave(torch.tensor([source.size for source in sources]))
        found["kept"] = torch.bincount(owner_M[merge.chosen_R], minlength=len(sources)).tolist()
    return found


def output_errors(
    merge: Merge, sources: Sequence[Bottleneck], weights: Sequence[float], moments: Moments
) -> dict[str, Any]:
    """The output error of one site against the adapters' mean and against what the merged output stands for.

    Args:
        merge: with its repair.
        sources: the adapters.
        weights: w.
        moments: of activations, the merged adapter's first, then those of the adapters.
    """
    error = output_error(merge.bottleneck, sources, merge.outputs, moments)
    outputs = tuple(output_weights(weights, "mean"))
    mean = error if outputs == merge.outputs else output_error(merge.bottleneck, sources, outputs, moments)
    return {"output_error": _finite(mean), "scaled_output_error": _finite(error)}


def describe_update(
    merged: LowRank, updates: Sequence[LowRank], outputs: Sequence[float], lost: float
) -> dict[str, Any]:
    """The figures of one linear map.

    Args:
        merged: the merged update.
        updates: those of the adapters.
        outputs: v.
        lost: what the cut to the rank lost.

    Returns:
        ``cosine`` of the merged update with each adapter's, ``norm_ratio``, ``lost``, and ``update_error``,
        ``|dW - sum v dW_j| / |sum v dW_j|``, from products of factors.
    """
    wanted = concatenate(updates, outputs)
    norms = [_norm(update) for update in updates]
    own, size = _norm(merged), _norm(wanted)
    squared = own**2 - 2 * _inner(merged, wanted) + size**2
    cosines = [
        _inner(merged, update) / (own * norm) if own * norm else math.nan
        for update, norm in zip(updates, norms, strict=True)
    ]
    mean = sum(norms) / len(norms)
    return {
        "rank": merged.rank,
        "cosine": [_finite(cosine) for cosine in cosines],
        "norm_ratio": _finite(own / mean if mean else math.nan),
        "lost": _finite(lost),
        "update_error": _finite(max(squared, 0.0) ** 0.5 / size if size else math.nan),
    }


def _inner(one: LowRank, other: LowRank) -> float:
    """Sum of the products of two updates' entries."""
    a_RS = one.a_RD.double() @ other.a_RD.double().t()
    b_RS = one.b_OR.double().t() @ other.b_OR.double()
    return float((a_RS * b_RS).sum()) * one.scaling * other.scaling


def _norm(update: LowRank) -> float:
    return max(_inner(update, update), 0.0) ** 0.5


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
