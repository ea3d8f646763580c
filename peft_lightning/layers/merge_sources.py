"""Adapters to merge as plain tensors, and what they must have in common.

Shapes: D model width, R neurons or rank, O output width of a linear map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.functional.lowrank import LowRank
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.layers.adapters import AdapterConfig

__all__ = ["MergeSource", "bottleneck_tensors", "check_alike", "updates_of"]

_MERGED = ("houlsby", "pfeiffer", "parallel", "lora")


@dataclass(frozen=True, kw_only=True)
class MergeSource:
    """One adapter of those that are merged.

    Attributes:
        name: what reports call it.
        adapter: kind, shape and place; its ``name`` is the one in the tensors' names.
        tensors: named as inside the bare backbone (``encoder.layer.0.output.adapters.NAME.adapter_up.weight``).
        masks: name of a tensor -> its bool mask, True = kept.
    """

    name: str
    adapter: AdapterConfig
    tensors: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def sites(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors by site and by their name there, from the first layer to the last; masks end in ``_mask``.

        What a mask removes is zero, whatever the tensor holds there.

        Raises:
            CheckpointError: if a tensor is no part of this adapter, or a mask belongs to no tensor of its shape.
        """
        group = "loras" if self.adapter.kind == "lora" else "adapters"
        found: dict[str, dict[str, Tensor]] = {}
        named = dict(self.tensors)
        for name, mask in self.masks.items():
            if name not in named or named[name].shape != mask.shape:
                raise CheckpointError(f"{self.name}: {name} is no tensor of its mask's shape {tuple(mask.shape)}")
            named |= {name: named[name] * mask, f"{name}_mask": mask}
        for name, tensor in named.items():
            site, inside, part = name.partition(f".{group}.{self.adapter.name}.")
            if not inside:
                raise CheckpointError(f"{self.name}: {name} is no tensor of the adapter {self.adapter.name!r}")
            found.setdefault(site, {})[part] = tensor
        return {site: found[site] for site in sorted(found, key=_natural)}

    def neurons(self) -> dict[str, Bottleneck]:
        """A bottleneck adapter's layers by site.

        Raises:
            CheckpointError: if a tensor is missing, or one does not fit the others.
        """
        return {site: _neurons(f"{self.name}: {site}", self.adapter, parts) for site, parts in self.sites().items()}


def check_alike(sources: Sequence[MergeSource]) -> None:
    """Adapters that can become one: of one kind and nonlinearity, at the same sites, and with names of their own.

    Raises:
        UsageError: if there is none, two have the same name, or they differ in what cannot be merged.
    """
    names = [source.name for source in sources]
    if not names:
        raise UsageError("adapters: must be at least one")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"adapters: two are called {twice[0]!r}; their names must differ")
    first = sources[0]
    if first.adapter.kind not in _MERGED:
        raise UsageError(
            f"adapter.kind = {first.adapter.kind!r} ({first.name}): prefixes have no neurons to match; "
            f"{', '.join(_MERGED)} can be merged"
        )
    held = first.sites().keys()
    for other in sources[1:]:
        options = ("kind",) if first.adapter.kind == "lora" else ("kind", "nonlinearity")
        for option in options:
            values = getattr(first.adapter, option), getattr(other.adapter, option)
            if values[0] != values[1]:
                raise UsageError(
                    f"adapter.{option}: {first.name} has {values[0]!r}, {other.name} has {values[1]!r}; "
                    "adapters that are merged must have the same"
                )
        if odd := sorted(held ^ other.sites().keys(), key=_natural):
            has = first.name if odd[0] in held else other.name
            raise UsageError(
                f"adapter.target: {first.name} and {other.name} are at different sites; only {has} has one at {odd[0]}"
            )


def updates_of(source: MergeSource) -> dict[str, LowRank]:
    """A LoRA adapter's updates by site.

    Raises:
        CheckpointError: if a tensor is missing.
    """
    found = {}
    for site, parts in source.sites().items():
        _check_parts(f"{source.name}: {site}", parts, {"lora_A", "lora_B"})
        found[site] = LowRank(parts["lora_A"], parts["lora_B"], source.adapter.factor)
    return found


def bottleneck_tensors(site: str, name: str, merged: Bottleneck) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors and masks of an adapter's layer, named as inside the backbone; no masks where it has none."""
    base = f"{site}.adapters.{name}"
    parts = {
        f"{base}.adapter_down.0.weight": (merged.down_RD, merged.down_mask_RD),
        f"{base}.adapter_down.0.bias": (merged.down_bias_R, None),
        f"{base}.adapter_up.weight": (merged.up_DR, merged.up_mask_DR),
        f"{base}.adapter_up.bias": (merged.up_bias_D, None),
    }
    tensors = {key: tensor.contiguous() for key, (tensor, _) in parts.items() if tensor is not None}
    return tensors, {key: mask.contiguous() for key, (_, mask) in parts.items() if mask is not None}


def _neurons(where: str, adapter: AdapterConfig, parts: Mapping[str, Tensor]) -> Bottleneck:
    wanted = {f"{side}.{kind}" for side in ("adapter_down.0", "adapter_up") for kind in ("weight", "bias")}
    masks = {"adapter_down.0.weight_mask", "adapter_up.weight_mask"}
    _check_parts(where, parts, wanted, masks)
    try:
        return Bottleneck(
            parts["adapter_down.0.weight"],
            parts["adapter_down.0.bias"],
            parts["adapter_up.weight"],
            parts["adapter_up.bias"],
            adapter.factor,
            parts.get("adapter_down.0.weight_mask"),
            parts.get("adapter_up.weight_mask"),
        )
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _check_parts(
    where: str, parts: Mapping[str, Tensor], wanted: set[str], more: frozenset[str] | set[str] = frozenset()
) -> None:
    plain = {part for part in parts if not part.endswith("_mask")}
    if odd := sorted(wanted - plain) + sorted(parts.keys() - wanted - more - {f"{name}_mask" for name in wanted}):
        raise CheckpointError(f"{where}: {odd[0]} is {'missing' if odd[0] in wanted else 'unexpected'}")


@lru_cache(maxsize=4096)
def _natural(path: str) -> tuple[tuple[int, str], ...]:
    """Numbers in a path as numbers, so that layer 10 comes after layer 2."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path))
