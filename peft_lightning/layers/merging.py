"""Merging pretrained adapters of a whole backbone into one (MerA: He et al., 2023, arXiv:2308.15982).

What is done at one site is in functional/merging; here are the sites, the passes over unlabelled data that a recipe
needs (layers/calibration), and the report. The paper leaves open on which forward pass activations are taken; here it
is each adapter's own, and the merged one's own for the repair, whose inputs are those before any site is repaired.

LoRA's updates are merged by functional/lowrank, linear map by linear map, without data.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.functional.combining import output_weights
from peft_lightning.functional.lowrank import merge_updates
from peft_lightning.functional.merging import Merge, merge
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.functional.recipes import Recipe
from peft_lightning.functional.repairing import refit
from peft_lightning.layers.adapters import AdapterConfig
from peft_lightning.layers.calibration import Calibration, Observed
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merge_report import describe_bottleneck, describe_update, heading, output_errors
from peft_lightning.layers.merge_sources import MergeSource, bottleneck_tensors, check_alike, updates_of

__all__ = ["MergeSource", "Merged", "merge_adapters", "merged_config", "needs_data"]

_NAME = "merged"
_ERROR_SHARE = 8  # where nothing is decided, output errors are estimated on this part of the tokens


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged adapter.

    Attributes:
        adapter: its shape; scaling 1.
        tensors: fp32, named as inside the bare backbone.
        masks: name of a tensor -> its bool mask, True = kept; empty where nothing is removed.
        report: plain values: what was done, and figures by site.
    """

    adapter: AdapterConfig
    tensors: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any]


def needs_data(sources: Sequence[MergeSource], config: MergeConfig) -> bool:
    """Whether a merge of these adapters needs calibration batches."""
    return sources[0].adapter.kind != "lora" and bool(_recipe(sources, config).needs)


def merged_config(sources: Sequence[MergeSource], config: MergeConfig) -> AdapterConfig:
    """What kind of adapter a merge gives, without computing it.

    Raises:
        UsageError: if the adapters cannot become one, settings and adapters do not fit, or the number of neurons
            depends on the data.
        CheckpointError: if a source's tensors are incomplete.
    """
    check_alike(sources)
    weights = _weights(sources, config)
    first = sources[0].adapter
    sizes = [source.adapter.bottleneck for source in sources]
    if first.kind == "lora":
        options = config.update_options()
        output_weights(weights, options["scale"])
        width = sum(sizes) if options["method"] == "cat" else options["rank"] or max(sizes)
        if options["rank"] is not None and width > (most := _most_ranks(sources)):
            raise UsageError(f"merge.rank = {width}: must be at most {most}, the rank of the largest matrix")
    else:
        recipe = _recipe(sources, config)
        output_weights(weights, recipe.scale)
        width = _width(sizes, recipe)
    return replace(
        first, bottleneck=width, scaling=1.0, name=_NAME, cross=any(source.adapter.cross for source in sources)
    )


@torch.no_grad()
def merge_adapters(
    backbone: nn.Module | None,
    sources: Sequence[MergeSource],
    config: MergeConfig,
    batches: Callable[[], Iterable[Mapping[str, Any]]] | None = None,
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Merged:
    """Merge adapters.

    Args:
        backbone: a model of transformers, for activations only; it is not changed, and adapters that it has take no
            part in them. None: there is no data.
        sources: at least one.
        config: how.
        batches: gives an iterable of model inputs (``input_ids``, ``attention_mask`` and so on), anew for each pass:
            one for what the recipe needs of the adapters, and one with the merged adapter beside them for a repair
            and for output errors. None: no data, for recipes that need none.
        summed: adds a tensor up over all ranks; each rank gives its own batches and gets the same adapter.

    Returns:
        The merged adapter and its report.

    Raises:
        UsageError: if the adapters cannot become one, settings and adapters do not fit, or there is no data where the
            recipe needs it.
        CheckpointError: if a source's tensors are incomplete.
    """
    adapter = merged_config(sources, config)
    if adapter.kind == "lora":
        return _merge_lora(sources, config, adapter)
    recipe, weights = _recipe(sources, config), _weights(sources, config)
    calibration = None
    if batches is not None and backbone is not None:
        shared = config.streams == "shared"
        calibration = Calibration(
            backbone=backbone,
            kind=adapter.kind,
            nonlinearity=adapter.nonlinearity,
            batches=batches,
            shared=shared,
            summed=summed,
        )
    elif recipe.needs:
        raise UsageError(f"merge.preset = {config.preset!r}: needs unlabelled data for activations, and none is given")
    groups = [source.neurons() for source in sources]
    report = heading([source.name for source in sources], weights, output_weights(weights, recipe.scale), recipe)
    report |= {"preset": config.preset, "streams": config.streams if calibration else None}
    merges = _merge_sites(groups, recipe, weights, adapter, calibration, config.tokens, report)
    tensors, masks = _named(merges, adapter.name)
    return Merged(adapter=adapter, tensors=tensors, masks=masks, report=report)


def _merge_sites(
    groups: list[dict[str, Bottleneck]],
    recipe: Recipe,
    weights: list[float],
    adapter: AdapterConfig,
    calibration: Calibration | None,
    tokens: int,
    report: dict[str, Any],
) -> dict[str, Merge]:
    """All sites' merges, repaired; the report gets its figures."""
    sites = list(groups[0])
    first, statistics = Observed({}, {}, 0), 0
    sides = [side for side in ("pre", "post") if side in recipe.needs]
    if calibration is not None and sides:
        first = calibration.observe(groups, sides, tokens)
        statistics = first.nbytes
    merges = {}
    for site in sites:  # moments of sites that are done go
        merges[site] = merge(
            [group[site] for group in groups],
            recipe,
            weights=weights,
            nonlinearity=adapter.nonlinearity,
            pre=first.pre.pop(site, None),
            post=first.post.pop(site, None),
        )
    second, repaired = Observed({}, {}, 0), "refit" in recipe.needs
    if calibration is not None:
        new = {site: found.bottleneck for site, found in merges.items()}
        share = tokens if repaired else -(-tokens // _ERROR_SHARE)
        second = calibration.observe([new, *groups], ["post"], share, whole=repaired)
        statistics = max(statistics, second.nbytes)
    figures = {}
    for site in sites:
        at_site, moments = [group[site] for group in groups], second.post.pop(site, None)
        if repaired and moments is not None:
            merges[site] = _repaired(merges[site], at_site, moments, recipe.ridge)
        figures[site] = describe_bottleneck(merges[site], at_site, report["sources"])
        if moments is not None:
            figures[site] |= output_errors(merges[site], at_site, weights, moments)
    report |= {"tokens": first.tokens or (second.tokens if repaired else 0), "error_tokens": second.tokens}
    report |= {"statistics_bytes": statistics, "sites": figures}
    return merges


def _repaired(found: Merge, sources: Sequence[Bottleneck], moments: Moments, ridge: float) -> Merge:
    """The merge with its up projection fitted, and the norm ratio that follows."""
    fitted = refit(found.bottleneck, sources, found.outputs, moments, ridge)
    norms = [
        sum(float(side.double().square().sum()) for side in (adapter.down_RD, adapter.up_DR)) ** 0.5
        for adapter in (fitted, found.bottleneck)
    ]
    return replace(found, bottleneck=fitted, norm_ratio=found.norm_ratio * norms[0] / (norms[1] or 1.0))


def _named(merges: Mapping[str, Merge], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of all sites, and their masks if any site has some."""
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for site, found in merges.items():
        own, kept = bottleneck_tensors(site, name, found.bottleneck)
        tensors |= own
        masks |= kept
    _check_finite(tensors)
    if masks:
        matrices = [key for key, tensor in tensors.items() if tensor.ndim == 2]
        masks = {key: masks.get(key, torch.ones_like(tensors[key], dtype=torch.bool)) for key in matrices}
    return tensors, masks


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    # a sum is finite only where all is, and takes no tensor of its own
    doubtful = [tensor for tensor in tensors.values() if not math.isfinite(float(tensor.sum()))]
    if any(not bool(torch.isfinite(tensor).all()) for tensor in doubtful):
        raise UsageError("the merged adapter holds inf or NaN: so do the adapters, or their weights are too large")


def _merge_lora(sources: Sequence[MergeSource], config: MergeConfig, adapter: AdapterConfig) -> Merged:
    """Linear map by linear map; ranks below the setting's are filled up with zeros."""
    options, weights = config.update_options(), _weights(sources, config)
    outputs = output_weights(weights, options["scale"])
    groups = [updates_of(source) for source in sources]
    stages = {name: value for name, value in options.items() if name != "weights"}
    report = heading([source.name for source in sources], weights, outputs, stages)
    report |= {"preset": config.preset, "streams": None, "tokens": 0, "error_tokens": 0, "statistics_bytes": 0}
    tensors, figures = {}, {}
    for site in groups[0]:
        updates = [group[site] for group in groups]
        seed = (options["seed"] << 32) + zlib.crc32(site.encode())  # DARE drops other entries at each site
        merged, lost = merge_updates(updates, **{**options, "seed": seed})
        figures[site] = describe_update(merged, updates, outputs, lost)
        more = adapter.bottleneck - merged.rank
        base = f"{site}.loras.{adapter.name}"
        tensors[f"{base}.lora_A"] = nn.functional.pad(merged.a_RD, (0, 0, 0, more)).contiguous()
        tensors[f"{base}.lora_B"] = nn.functional.pad(merged.b_OR, (0, more)).contiguous()
    _check_finite(tensors)
    masks = _side_by_side_masks(sources, adapter.name) if options["method"] == "cat" else {}
    return Merged(adapter=adapter, tensors=tensors, masks=masks, report={**report, "sites": figures})


def _most_ranks(sources: Sequence[MergeSource]) -> int:
    return max(min(update.a_RD.shape[1], update.b_OR.shape[0]) for update in updates_of(sources[0]).values())


def _side_by_side_masks(sources: Sequence[MergeSource], name: str) -> dict[str, Tensor]:
    """Masks of concatenated ranks; those of an adapter without masks keep everything."""
    if not any(source.masks for source in sources):
        return {}
    groups = [source.sites() for source in sources]
    masks = {}
    for site in groups[0]:
        for part, dim in (("lora_A", 0), ("lora_B", 1)):
            parts = [group[site] for group in groups]
            kept = [own.get(f"{part}_mask", torch.ones_like(own[part], dtype=torch.bool)) for own in parts]
            masks[f"{site}.loras.{name}.{part}"] = torch.cat(kept, dim)
    return masks


def _recipe(sources: Sequence[MergeSource], config: MergeConfig) -> Recipe:
    """The recipe; a single adapter needs neither alignment nor repair, and stays what it is."""
    recipe = config.resolve([source.name for source in sources])
    whole = recipe.combine == "select" and recipe.width in (None, sources[0].adapter.bottleneck)
    if len(sources) == 1 and (whole or recipe.combine in ("average", "regmean")):
        return replace(recipe, balance=False, align="none", marginals="uniform", combine="average", repair="none")
    return recipe


def _weights(sources: Sequence[MergeSource], config: MergeConfig) -> list[float]:
    weights = [1.0] * len(sources) if config.weights is None else [float(weight) for weight in config.weights]
    if len(weights) != len(sources):
        raise UsageError(f"merge.weights = {weights}: must be {len(sources)}, one for each adapter")
    return weights


def _width(sizes: Sequence[int], recipe: Recipe) -> int:
    """Neurons of the merged adapter."""
    if recipe.combine == "select":
        if recipe.width is not None and recipe.width > sum(sizes):
            raise UsageError(f"merge.width = {recipe.width}: must be at most {sum(sizes)}, the neurons of all adapters")
        return recipe.width or max(sizes)
    reference = 0 if isinstance(recipe.reference, str) else recipe.reference
    if recipe.align == "none" or recipe.solver == "assignment":
        return max(sizes)
    if recipe.reference == "medoid" and len(set(sizes)) > 1:
        raise UsageError(
            f"merge.reference = 'medoid': with the solver {recipe.solver!r} and adapters of {list(sizes)} neurons the "
            "result's width would depend on the data; give an adapter, or the solver assignment"
        )
    return sizes[reference]
