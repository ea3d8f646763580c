"""From importance to decisions: which heads and neurons go, and which rank each block gets (Prune-LoRA, 3.2, 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.functional.heads import normalise
from peft_lightning.functional.saliency import random_scores
from peft_lightning.functional.sparsify import DegenerateScoreError
from peft_lightning.functional.structure import count_of, drop_lowest, drop_to_budget, share_ranks, top_ranks
from peft_lightning.layers.importance import Importance
from peft_lightning.layers.plan import PrunePlan
from peft_lightning.layers.prune_config import ImportanceConfig, RankConfig, StructureConfig
from peft_lightning.layers.pruned_heads import AttentionSite, attention_sites, feed_forward_sites
from peft_lightning.layers.unit_costs import unit_costs

__all__ = ["block_scores", "decide_plan", "final_importance", "needs_importance"]


def needs_importance(prune: StructureConfig, lora: RankConfig) -> bool:
    """Whether any decision follows the importance."""
    return lora.varied or (prune.order == "importance" and (prune.takes_heads or prune.takes_neurons))


def decide_plan(
    backbone: nn.Module,
    importance: Importance | None,
    *,
    settings: ImportanceConfig,
    prune: StructureConfig,
    lora: RankConfig,
    seed: int,
) -> PrunePlan:
    """What goes and which ranks are given.

    Args:
        backbone: a bare model of transformers, nothing removed yet; it is only looked at.
        importance: of its heads, and of what else the settings need; None where nothing follows it.
        settings: how importance is normalised, and what a block's is.
        prune: what goes.
        lora: which ranks there are.
        seed: of random orders.

    Raises:
        UsageError: if the importance is another backbone's, or what is asked for cannot be.
        DegenerateScoreError: if the importance ranks nothing.
    """
    sites, blocks = attention_sites(backbone), feed_forward_sites(backbone)
    heads = {path: site.units for path, site in sites.items()}
    neurons = {path: site.units for path, site in blocks.items()} if prune.takes_neurons else {}
    if importance is not None:
        _check_units(importance.heads, heads, "heads", settings)
        if neurons and prune.order == "importance":
            _check_units(importance.neurons, neurons, "neurons", settings)
    if prune.order == "random" or importance is None:
        raw = random_scores({path: torch.empty(units) for path, units in (heads | neurons).items()}, seed)
    else:
        raw = {**importance.heads, **{path: importance.neurons[path] for path in neurons}}
    if prune.target is None:
        kept = _by_count(raw, heads, neurons, prune, settings.norm)
    else:
        kept = _by_target(backbone, raw, heads, neurons, prune, settings.norm)
    return PrunePlan(
        heads={path: tuple(kept[path]) for path in heads},
        neurons={path: tuple(kept[path]) for path in neurons},
        ranks=_ranks(importance, sites, list(blocks), settings, lora),
        units=heads,
        inner=neurons,
    )


def block_scores(
    importance: Importance, sites: Mapping[str, AttentionSite], settings: ImportanceConfig
) -> dict[str, float]:
    """A block's importance, by the path of its layer.

    Raises:
        UsageError: if the blocks' own gates are asked for and were not measured.
        DegenerateScoreError: if the heads' importance, or the blocks', ranks nothing.
    """
    blocks = dict.fromkeys(site.block for site in sites.values())
    if settings.blocks == "gate":
        gates = {path: torch.empty(1) for path in importance.blocks}
        _check_units(gates, dict.fromkeys(blocks, 1), "blocks measured by a gate", settings)
        return _ranking({path: importance.blocks[path] for path in blocks})
    final = settings.blocks == "normalised"
    heads = normalise(importance.heads, settings.norm) if final else importance.heads
    parts = {block: torch.cat([heads[path] for path in heads if sites[path].block == block]) for block in blocks}
    return _ranking({block: float(part.mean() if final else part.sum()) for block, part in parts.items()})


def final_importance(importance: Importance, norm: str) -> dict[str, list[float]]:
    """Equation 2 of the heads, by the path of their attention; empty where it ranks nothing."""
    try:
        return {path: tensor.tolist() for path, tensor in normalise(importance.heads, norm).items()}
    except DegenerateScoreError:  # the decisions followed something else, such as gates of blocks
        return {}


def _ranking(scores: dict[str, float]) -> dict[str, float]:
    """The scores, if they rank the blocks."""
    if not all(map(math.isfinite, scores.values())) or (len(scores) > 1 and len(set(scores.values())) == 1):
        raise DegenerateScoreError(f"importance: that of the {len(scores)} blocks is all the same, or not finite")
    return scores


def _by_count(
    raw: Mapping[str, Tensor], heads: Mapping[str, int], neurons: Mapping[str, int], prune: StructureConfig, norm: str
) -> dict[str, list[int]]:
    kept: dict[str, list[int]] = {}
    for what, units, wanted, least in (
        ("heads_to_prune", heads, prune.heads, prune.min_heads_per_layer),
        ("ffn_to_prune", neurons, prune.neurons, prune.min_neurons_per_layer),
    ):
        total = sum(units.values())
        drop = count_of(wanted, total, f"prune.{what}")
        kept |= drop_lowest(_final(raw, units, prune, norm, 0 < drop < total), drop, least, f"prune.{what}")
    return kept


def _by_target(
    backbone: nn.Module,
    raw: Mapping[str, Tensor],
    heads: Mapping[str, int],
    neurons: Mapping[str, int],
    prune: StructureConfig,
    norm: str,
) -> dict[str, list[int]]:
    ((measure, share),) = (prune.target or {}).items()
    head_costs, neuron_costs, total = unit_costs(backbone, measure, prune.target_tokens)
    least = dict.fromkeys(heads, prune.min_heads_per_layer) if prune.takes_heads else dict(heads)
    least |= dict.fromkeys(neurons, prune.min_neurons_per_layer)
    kinds = [_final(raw, heads, prune, norm, prune.takes_heads), _final(raw, neurons, prune, norm, bool(neurons))]
    most, option = int(share * total), f"prune.target = {prune.target}"
    return drop_to_budget(kinds, head_costs | neuron_costs, least, most, total, option)


def _final(
    raw: Mapping[str, Tensor], units: Mapping[str, int], prune: StructureConfig, norm: str, ranked: bool
) -> Mapping[str, Tensor]:
    """The scores that decide: equation 2's of one kind of unit, or those that were drawn."""
    scores = {path: raw[path] for path in units}
    return normalise(scores, norm) if ranked and prune.order == "importance" else scores


def _ranks(
    importance: Importance | None,
    sites: Mapping[str, AttentionSite],
    blocks: list[str],
    settings: ImportanceConfig,
    lora: RankConfig,
) -> dict[str, int]:
    if not lora.varied:
        return dict.fromkeys(blocks, lora.rank)
    assert importance is not None
    scores = block_scores(importance, sites, settings)
    ranks = top_ranks(scores, lora.rank, lora.high_rank, lora.high_blocks)
    if lora.scheme == "top":
        return ranks
    return share_ranks(scores, sum(ranks.values()) if lora.budget is None else lora.budget)


def _check_units(given: Mapping[str, Tensor], here: Mapping[str, int], what: str, settings: ImportanceConfig) -> None:
    source = "importance" if settings.file is None else f"importance.file = {settings.file}"
    sizes: dict[str, Any] = {path: len(scores) for path, scores in given.items()}
    if not sizes:
        raise UsageError(
            f"{source}: has no {what}; measure again with these (peft-lightning importance --neurons, --blocks gate)"
        )
    if sizes != dict(here):
        wrong = [
            f"{path} {sizes.get(path, 0)} here {here.get(path, 0)}"
            for path in {**sizes, **here}
            if sizes.get(path) != here.get(path)
        ]
        more = ", ..." if len(wrong) > 4 else ""
        raise UsageError(f"{source}: is of another backbone ({what}: {'; '.join(wrong[:4])}{more})")
