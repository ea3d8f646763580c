"""Which adapter, where, how wide: from a setting to layers inside a backbone.

MAM is He et al.'s Mix-And-Match adapter (2022, section 4.6): prefixes in attention and a parallel adapter beside the
feed-forward block. Deviation: SparseAdapter divides the parameters equally between the two, so both get the same
number of weights here (2 r D a layer each), where He et al. give the prefix a small share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from peft_lightning.backbones.families import FAMILIES, family_of
from peft_lightning.checks import check_types
from peft_lightning.errors import UsageError
from peft_lightning.layers.bottleneck import NONLINEARITIES, Bottleneck
from peft_lightning.layers.inject import add_child, select_sites
from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.prefix import Prefix
from peft_lightning.layers.sites import find_sites, hook

__all__ = ["KINDS", "AdapterConfig", "attach_adapters", "refusal"]

KINDS: dict[str, float] = {"houlsby": 1.0, "pfeiffer": 1.0, "parallel": 4.0, "lora": 1.0, "mam": 4.0}
"""Kinds of adapters, with the usual scaling: 4 is He et al.'s for parallel adapters."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Kind, shape and place of the adapters.

    Attributes:
        kind: houlsby, pfeiffer, parallel, lora or mam (Mix-And-Match: prefixes and parallel adapters).
        bottleneck: r, the inner width; LoRA's rank; in MAM also the number of prefix positions, so that both halves
            have the same number of weights.
        nonlinearity: relu, gelu, gelu_new, tanh, silu, leaky_relu or identity; LoRA and prefixes have none.
        scaling: factor of the adapter's output; LoRA's alpha / r. None: what is usual for the kind.
        init_std: standard deviation of the matrices at initialisation (LoRA: of A; B starts from 0).
        target: regular expression over the sites' paths; adapters go where it is found. None: everywhere, and for
            LoRA the projections of query and value.
        name: the adapter's name inside the backbone.
        cross: whether Houlsby's adapters also follow a decoder's attention to the encoder.

    Raises:
        UsageError: if a value is not allowed.
    """

    kind: str = "houlsby"
    bottleneck: int = 64
    nonlinearity: str = "relu"
    scaling: float | None = None
    init_std: float = 0.02
    target: str | None = None
    name: str = "sparse"
    cross: bool = False

    def __post_init__(self) -> None:
        check_types(self, "adapter")
        if self.kind not in KINDS:
            raise UsageError(f"adapter.kind = {self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.bottleneck < 1:
            raise UsageError(f"adapter.bottleneck = {self.bottleneck}: must be at least 1")
        if self.nonlinearity not in NONLINEARITIES:
            raise UsageError(
                f"adapter.nonlinearity = {self.nonlinearity!r}: must be one of {', '.join(NONLINEARITIES)}"
            )
        if not self.init_std > 0:  # from zero, a matrix and its partner never get a gradient
            raise UsageError(f"adapter.init_std = {self.init_std}: must be above 0")
        if self.cross and self.kind != "houlsby":
            raise UsageError(f"adapter.cross = True: adapter.kind must be houlsby, not {self.kind!r}")

    @property
    def factor(self) -> float:
        """The scaling in force."""
        return KINDS[self.kind] if self.scaling is None else self.scaling


def refusal(model_type: str, kind: str) -> str | None:
    """Why a kind of adapter cannot be attached to an architecture of the table, or None where it can."""
    if kind == "mam" and FAMILIES[model_type].prefixes is None:
        able = [name for name, family in FAMILIES.items() if family.prefixes]
        return f"prefixes enter the attention of {' and '.join(able)} only"
    return None


def attach_adapters(
    backbone: nn.Module, config: AdapterConfig, *, masked: bool = False, multiplier: int = 1, hooked: bool = True
) -> dict[str, nn.Module]:
    """Build the adapters that a setting asks for and hook them on a backbone.

    Args:
        backbone: a bare model of transformers, changed in place.
        config: kind, shape and place.
        masked: whether the adapters' matrices carry masks.
        multiplier: factor of the inner width (Large-Sparse).
        hooked: False leaves them without effect, for what puts several of them together.

    Returns:
        The new modules by their path inside the backbone.

    Raises:
        UsageError: if the architecture does not take this kind, or the target or the name is wrong.
    """
    hf_config: Any = backbone.config
    family = family_of(hf_config.model_type)
    if (reason := refusal(hf_config.model_type, config.kind)) is not None:
        raise UsageError(f"adapter.kind = {config.kind!r} on a backbone of type {hf_config.model_type!r}: {reason}")
    if config.cross and not family.crossing:
        able = " and ".join(name for name, other in FAMILIES.items() if other.crossing)
        raise UsageError(f"adapter.cross = True on a backbone of type {hf_config.model_type!r}: must be {able}")
    sites = find_sites(backbone, config.kind, cross=config.cross)
    if config.kind == "lora" and config.target is None:
        chosen = {site.path for site in sites if site.place.owner in family.query_value}
    else:
        chosen = set(select_sites([site.path for site in sites], config.target or ""))
    adapters: dict[str, nn.Module] = {}
    for site in sites:
        if site.path in chosen:
            inner = config.bottleneck * multiplier
            adapter = _build(backbone, site.path, config, site.place.how, inner, masked)
            group = {LoRA: "loras", Prefix: "prefixes"}.get(type(adapter), "adapters")
            adapters[add_child(backbone, site.path, group, config.name, adapter)] = adapter
            if hooked:
                hook(backbone, site, adapter)
    return adapters


def _build(backbone: nn.Module, site: str, config: AdapterConfig, how: str, inner: int, masked: bool) -> nn.Module:
    width = cast(Any, backbone.config).hidden_size
    common: dict[str, Any] = {"init_std": config.init_std, "masked": masked}
    if how == "prefix":
        return Prefix(width, inner, **common)
    if how == "lora":
        linear = cast(nn.Linear, backbone.get_submodule(site))
        return LoRA(linear.in_features, linear.out_features, inner, scaling=config.factor, **common)
    return Bottleneck(width, inner, nonlinearity=config.nonlinearity, scaling=config.factor, **common)
