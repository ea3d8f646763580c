"""Attach adapters to a backbone by child modules and forward hooks; the backbone's own names do not change.

Houlsby's placement: one adapter after the attention block's output projection and one after the feed-forward block's,
before the residual sum and its LayerNorm. An adapter sits at ``<block>.adapters.<name>``, which makes the tensor names
AdapterHub's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import nn

from peft_lightning.errors import UsageError
from peft_lightning.layers.bottleneck import Bottleneck

__all__ = ["Injection", "inject", "select_sites"]


@dataclass(frozen=True)
class Injection:
    """What an injection changed.

    Attributes:
        adapters: full name of each new submodule of the backbone -> the adapter.
    """

    adapters: dict[str, Bottleneck]

    def describe(self) -> str:
        """One line for people."""
        parameters = sum(p.numel() for adapter in self.adapters.values() for p in adapter.parameters())
        return f"{len(self.adapters)} adapters with {parameters:,} parameters"


def select_sites(candidates: list[str], target: str) -> list[str]:
    """The candidate sites that a regular expression finds, in order.

    Raises:
        UsageError: if the expression is invalid or matches none; lists the candidates.
    """
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UsageError(f"adapter.target = {target!r}: not a regular expression ({error})") from None
    chosen = [site for site in candidates if pattern.search(site)]
    if not chosen:
        raise UsageError(f"adapter.target = {target!r} matches no site; there are: {', '.join(candidates)}")
    return chosen


def inject(backbone: nn.Module, sites: list[str], tail: str, name: str, build: Callable[[], Bottleneck]) -> Injection:
    """Build one adapter per site and hook it on the site's tail.

    Args:
        backbone: the model to change in place.
        sites: paths of blocks inside it; each gets an ``adapters`` child.
        tail: child of a block whose output the adapter replaces.
        name: the adapter's name, an identifier; must be new at each site.
        build: makes one adapter.

    Returns:
        The new modules by name.

    Raises:
        UsageError: if the name is not an identifier or is taken.
    """
    if not name.isidentifier():
        raise UsageError(f"adapter.name = {name!r}: must be an identifier (letters, digits, underscores)")
    adapters: dict[str, Bottleneck] = {}
    for site in sites:
        block = backbone.get_submodule(site)
        if not hasattr(block, "adapters"):
            block.adapters = nn.ModuleDict()
        named = cast(nn.ModuleDict, block.adapters)
        if name in named:
            raise UsageError(f"adapter.name = {name!r}: {site} already has an adapter of this name")
        adapter = build()
        named[name] = adapter
        block.get_submodule(tail).register_forward_hook(adapter.hook)
        adapters[f"{site}.adapters.{name}"] = adapter
    return Injection(adapters)
