"""Heads and neurons really removed (Prune-LoRA, section 3.2 and the future work of section 5).

The paper sets W_i^Q, W_i^K, W_i^V and W^O_i of a head i to 0. Here their rows (of the output, its columns) are taken
out of the tensors, which gives the same function: a head whose columns of W^O are 0 adds nothing to the block's output.
The output's bias stays. Keys and values that several query heads share (grouped-query attention) go with all of them,
so a *unit* is a head, or such a group; of a gated feed-forward block a neuron is a row of both maps in.

Shapes: U units of an attention, W columns of a unit at the output's entrance (R query heads a group times head width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from peft_lightning.backbones.families import Attention, family_of
from peft_lightning.errors import UsageError

__all__ = ["AttentionSite", "FeedForwardSite", "attention_sites", "feed_forward_sites", "prune_units"]


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention of a backbone.

    Attributes:
        path: of the attention inside the backbone.
        block: path of the layer that it belongs to.
        names: what the architecture calls its parts.
        units: U, heads or groups of heads.
        width: W, columns of one unit at the output's entrance.
        key_width: rows of one unit in the maps to keys and to values.
    """

    path: str
    block: str
    names: Attention
    units: int
    width: int
    key_width: int

    def linears(self) -> dict[str, str]:
        """query, key, value, output -> path of that linear map inside the backbone."""
        parts = zip(("query", "key", "value", "output"), self.names.linears, strict=True)
        return {name: f"{self.block}.{linear}" for name, linear in parts}


@dataclass(frozen=True, kw_only=True)
class FeedForwardSite:
    """One feed-forward block of a backbone; a unit is a neuron.

    Attributes:
        block: path of the layer that it belongs to; also its own name.
        inner: paths of the maps into it.
        outer: path of the map out of it.
        units: U, its neurons.
    """

    block: str
    inner: tuple[str, ...]
    outer: str
    units: int


def attention_sites(backbone: nn.Module) -> dict[str, AttentionSite]:
    """All attentions of a backbone by path, in the model's order.

    Raises:
        UsageError: if the architecture is not known, or a part is no plain linear map that can be cut.
    """
    config: Any = backbone.config
    family = family_of(config.model_type)
    sites = {}
    for block in family.layers(config):
        layer = backbone.get_submodule(block)
        for names in family.attentions:
            if _has(layer, names.module):
                site = _attention_site(layer, block, names)
                sites[site.path] = site
    return sites


def feed_forward_sites(backbone: nn.Module) -> dict[str, FeedForwardSite]:
    """All feed-forward blocks of a backbone by the path of their layer, in the model's order.

    Raises:
        UsageError: if the architecture is not known, or a part is no plain linear map that can be cut.
    """
    config: Any = backbone.config
    family = family_of(config.model_type)
    sites = {}
    for block in family.layers(config):
        layer = backbone.get_submodule(block)
        units = _linear(layer, block, family.outer).in_features
        for name in family.inner:
            if (rows := _linear(layer, block, name).out_features) != units:
                raise UsageError(f"{block}.{name}: has {rows} rows, {family.outer} {units} columns; cannot be sliced")
        inner = tuple(f"{block}.{name}" for name in family.inner)
        sites[block] = FeedForwardSite(block=block, inner=inner, outer=f"{block}.{family.outer}", units=units)
    return sites


@torch.no_grad()
def prune_units(backbone: nn.Module, heads: Mapping[str, Sequence[int]], neurons: Mapping[str, Sequence[int]]) -> None:
    """Take heads and neurons out of a backbone, in place; nothing is touched unless all of it fits.

    Linear maps stay the same modules with smaller tensors of the same dtype and device, so hooks on them stay too.

    Args:
        backbone: a bare model of transformers.
        heads: path of an attention -> the units it keeps, in order; those not named keep all.
        neurons: path of a layer -> the neurons that its feed-forward block keeps; the same.

    Raises:
        UsageError: if the architecture cannot be sliced, or there is no such attention, layer or unit.
    """
    attentions = attention_sites(backbone)
    blocks = feed_forward_sites(backbone) if neurons else {}
    _check(heads, {path: site.units for path, site in attentions.items()}, "head")
    _check(neurons, {path: site.units for path, site in blocks.items()}, "neuron")
    for path, kept in heads.items():
        names = attentions[path].names
        if not kept and not names.runs_empty:
            kind = cast(Any, backbone.config).model_type
            raise UsageError(f"{path}: the attention of {kind} cannot run without a head; must keep one at least")
    for path, kept in heads.items():
        if len(kept) < attentions[path].units:
            _prune_attention(backbone, attentions[path], kept)
    for path, kept in neurons.items():
        if len(kept) < blocks[path].units:
            index = torch.tensor(kept, dtype=torch.long)
            for linear in blocks[path].inner:
                _cut(backbone.get_submodule(linear), 0, index)
            _cut(backbone.get_submodule(blocks[path].outer), 1, index)


def _prune_attention(backbone: nn.Module, site: AttentionSite, kept: Sequence[int]) -> None:
    layer, names = backbone.get_submodule(site.block), site.names
    wide, narrow = _columns(kept, site.width), _columns(kept, site.key_width)
    _cut(layer.get_submodule(names.query), 0, wide)
    _cut(layer.get_submodule(names.key), 0, narrow)
    _cut(layer.get_submodule(names.value), 0, narrow)
    for name in names.positions:
        if _has(layer, name):
            _cut(layer.get_submodule(name), 0, wide)
    _cut(layer.get_submodule(names.output), 1, wide)
    module = layer.get_submodule(names.module)
    for attribute in names.counts:
        setattr(module, attribute, len(wide) // int(getattr(module, names.head_size)))
    for attribute in names.widths:
        setattr(module, attribute, len(wide))


def _attention_site(layer: nn.Module, block: str, names: Attention) -> AttentionSite:
    size = int(getattr(layer.get_submodule(names.module), names.head_size))
    rows = {name: _linear(layer, block, name).out_features for name in (names.query, names.key, names.value)}
    wide, narrow, values = rows.values()
    columns = _linear(layer, block, names.output).in_features
    for name in names.positions:
        if _has(layer, name) and _linear(layer, block, name).out_features != wide:
            raise UsageError(f"{block}.{name}: its rows are not those of the heads; cannot be sliced")
    units = narrow // size
    if narrow % size or narrow != values or wide != columns or wide % max(1, narrow) or (wide and not narrow):
        shown = ", ".join(f"{name} {count}" for name, count in {**rows, names.output: columns}.items())
        raise UsageError(f"{block}.{names.module}: heads of width {size} do not divide its maps ({shown})")
    width = wide // units if units else size
    path = f"{block}.{names.module}"
    return AttentionSite(path=path, block=block, names=names, units=units, width=width, key_width=size)


def _check(kept: Mapping[str, Sequence[int]], units: Mapping[str, int], what: str) -> None:
    for path, numbers in kept.items():
        if path not in units:
            raise UsageError(f"{path}: the backbone has no {what}s there; there are: {', '.join(units)}")
        fits = all(type(number) is int and 0 <= number < units[path] for number in numbers)
        if not fits or list(numbers) != sorted(set(numbers)):
            raise UsageError(
                f"{path}: the {what}s to keep must be numbers from 0 to {units[path] - 1}, each once, in order"
            )


def _columns(units: Sequence[int], width: int) -> torch.Tensor:
    return (torch.tensor(units, dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


def _cut(linear: nn.Module, dim: int, index: torch.Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    index = index.to(linear.weight.device)
    weight = linear.weight
    linear.weight = nn.Parameter(weight.index_select(dim, index), requires_grad=weight.requires_grad)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _linear(layer: nn.Module, block: str, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    if type(module) is not nn.Linear:
        raise UsageError(f"{block}.{name}: is a {type(module).__name__}, not a plain linear map; cannot be sliced")
    return module


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True
