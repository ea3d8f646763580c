"""Attach adapters to a backbone by child modules and hooks; the backbone's own names do not change.

An adapter sits at ``<site>.adapters.<name>`` (LoRA: ``<site>.loras.<name>``, prefixes: ``<site>.prefixes.<name>``),
which makes the tensor names AdapterHub's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from peft_lightning.errors import UsageError
from peft_lightning.functional.patterns import compile_pattern

__all__ = ["add_child", "select_sites"]


def select_sites(candidates: Sequence[str], target: str) -> list[str]:
    """The candidate sites that a regular expression finds, in order.

    Raises:
        UsageError: if the expression is invalid or matches none; lists the candidates.
    """
    pattern = compile_pattern(target, "adapter.target")
    chosen = [site for site in candidates if pattern.search(site)]
    if not chosen:
        raise UsageError(f"adapter.target = {target!r} matches no site; there are: {', '.join(candidates)}")
    return chosen


def add_child(backbone: nn.Module, site: str, group: str, name: str, adapter: nn.Module) -> str:
    """Make an adapter a child of a site.

    Args:
        backbone: the model to change in place.
        site: path of the submodule that gets the child.
        group: name of the ``ModuleDict`` there.
        name: the adapter's name in it, without a dot; must be new.
        adapter: the new module.

    Returns:
        The adapter's path inside the backbone.

    Raises:
        UsageError: if the name cannot be a submodule's or is taken.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UsageError(f"adapter.name = {name!r}: must hold no dot and be no attribute of a torch module")
    owner = backbone.get_submodule(site)
    if not hasattr(owner, group):
        setattr(owner, group, nn.ModuleDict())
    named = cast(nn.ModuleDict, getattr(owner, group))
    if name in named:
        raise UsageError(f"adapter.name = {name!r}: {site} already has an adapter of this name")
    named[name] = adapter
    return f"{site}.{group}.{name}"
