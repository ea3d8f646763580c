"""The places in a backbone where adapters of a kind compute, and how a layer is tied to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_lightning.backbones.families import Family, Place, family_of
from peft_lightning.errors import UsageError
from peft_lightning.layers.hooks import SiteLayer
from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.prefix import Prefix, enable_prefixes

__all__ = ["Site", "find_sites", "hook"]


@dataclass(frozen=True)
class Site:
    """One place of one layer.

    Attributes:
        path: of the submodule that has the adapter as a child.
        layer: path of the transformer layer.
        place: where in the layer.
    """

    path: str
    layer: str
    place: Place


def find_sites(backbone: nn.Module, kind: str, *, cross: bool = False) -> list[Site]:
    """All sites that adapters of a kind may have in a backbone, from the first layer to the last.

    Args:
        backbone: a bare model of transformers.
        kind: of ``layers.adapters.KINDS``.
        cross: whether Houlsby's adapters also follow a decoder's attention to the encoder.

    Raises:
        UsageError: if the architecture is unknown.
    """
    hf_config: Any = backbone.config
    family = family_of(hf_config.model_type)
    places = [*_places(family, kind), *(family.crossing if cross else ())]
    there = {name for name, _ in backbone.named_modules()}
    return [
        Site(path, layer, place)
        for layer in family.layers(hf_config)
        for place in places
        if (path := f"{layer}.{place.owner}".rstrip(".")) in there or place not in family.crossing
    ]


def hook(backbone: nn.Module, site: Site, layer: nn.Module) -> None:
    """Tie a layer to a site, so that it takes part in the backbone's computation.

    Raises:
        UsageError: if another one is there already and the two do not compose.
    """
    place = site.place
    first = backbone.get_submodule(f"{site.layer}.{place.hook}".rstrip("."))
    if isinstance(layer, Prefix):
        enable_prefixes(backbone)
    elif isinstance(layer, LoRA):
        first.register_forward_hook(layer.after)
    elif isinstance(layer, SiteLayer) and place.how == "beside_residual":
        first.register_forward_pre_hook(layer.beside_residual)
    elif isinstance(layer, SiteLayer) and place.last:
        first.register_forward_pre_hook(layer.remember)
        backbone.get_submodule(f"{site.layer}.{place.last}").register_forward_hook(layer.beside_remembered)
    elif place.how == "around_norm" and first._forward_hooks:
        raise UsageError(f"adapter.kind = {'pfeiffer'!r}: {site.layer} has one already, and two do not compose")
    else:
        first.register_forward_hook(getattr(layer, place.how))


def _places(family: Family, kind: str) -> list[Place]:
    if kind == "houlsby":
        return list(family.sequential)
    if kind == "pfeiffer":
        return [family.closing]
    if kind == "lora":
        return [Place(name, name, "lora") for name in family.linears]
    if kind == "parallel":
        return [family.parallel]
    assert family.prefixes is not None
    return [Place(family.prefixes, family.prefixes, "prefix"), family.parallel]
