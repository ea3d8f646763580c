"""What is left of a backbone and which ranks it gets: decided once, kept in every file, applied before weights are loaded.

A plan names the units that each layer keeps by their numbers in the whole backbone, so it can be read without the
importance that led to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.layers.inject import add_child
from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.prune_config import RankConfig
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites, prune_units

__all__ = ["PrunePlan", "apply_plan"]

_NAME = "pruned"


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """The decisions of Prune-LoRA.

    Attributes:
        heads: path of an attention -> numbers of the heads (or groups) that it keeps, in order; every attention.
        neurons: path of a layer -> numbers of the neurons that it keeps, in order; layers not named keep all.
        ranks: path of a layer -> rank of LoRA in its attentions; every layer.
        units: path of an attention -> how many heads it had.
        inner: path of a layer -> how many neurons it had; those named in ``neurons``.
    """

    heads: Mapping[str, tuple[int, ...]]
    neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, int]
    units: Mapping[str, int]
    inner: Mapping[str, int] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {
            "heads": {path: list(kept) for path, kept in self.heads.items()},
            "neurons": {path: list(kept) for path, kept in self.neurons.items()},
            **{name: dict(getattr(self, name)) for name in ("ranks", "units", "inner")},
        }

    @classmethod
    def of(cls, values: Any, what: str) -> PrunePlan:
        """The plan in a manifest.

        Raises:
            CheckpointError: if it is malformed; ``what`` is the file's name.
        """
        if not isinstance(values, dict) or values.keys() != {"heads", "neurons", "ranks", "units", "inner"}:
            raise CheckpointError(f"{what}: damaged (it does not say which heads were kept)")
        for name, entries in values.items():
            lists = name in ("heads", "neurons")
            for path, entry in entries.items() if isinstance(entries, dict) else [("", None)]:
                numbers = entry if lists and isinstance(entry, list) else None if lists else [entry]
                if not isinstance(path, str) or numbers is None or any(type(n) is not int or n < 0 for n in numbers):
                    raise CheckpointError(f"{what}: damaged ({name} {str(path)[:100]!r} in its plan is malformed)")
        kept = {name: {path: tuple(numbers) for path, numbers in values[name].items()} for name in ("heads", "neurons")}
        return cls(**kept, ranks=values["ranks"], units=values["units"], inner=values["inner"])

    def check(self, backbone: nn.Module) -> None:
        """Compare with a whole backbone, before anything is taken out of it.

        Raises:
            UsageError: if an attention or a layer is missing or has another size, a number is out of range, or a rank
                is above the smaller dimension of what it goes to; names it.
        """
        sites = attention_sites(backbone)
        here = {path: site.units for path, site in sites.items()}
        if dict(self.units) != here or self.heads.keys() != here.keys():
            raise UsageError(f"the plan is for attentions with heads {dict(self.units)}, the backbone has {here}")
        if self.neurons:
            blocks = {path: site.units for path, site in feed_forward_sites(backbone).items()}
            if wrong := {path: n for path, n in self.inner.items() if blocks.get(path) != n}:
                raise UsageError(f"the plan is for layers with neurons {wrong}, the backbone has {blocks}")
            if self.inner.keys() != self.neurons.keys():
                raise UsageError("the plan does not say how many neurons its layers had")
        if self.ranks.keys() != {site.block for site in sites.values()}:
            raise UsageError(f"the plan has ranks for {', '.join(self.ranks)}, not for the backbone's layers")
        for path, site in sites.items():
            for name, linear in site.linears().items():
                smaller = self._smaller(backbone.get_submodule(linear), len(self.heads[path]), site, name)
                if self.heads[path] and not 1 <= (rank := self.ranks[site.block]) <= smaller:
                    raise UsageError(f"lora: rank {rank} for {linear}: must be from 1 to {smaller}, its smaller dimension")

    @staticmethod
    def _smaller(linear: nn.Module, kept: int, site: Any, name: str) -> int:
        """The smaller dimension of a map after pruning."""
        width = kept * (site.width if name in ("query", "output") else site.key_width)
        other = cast(Any, linear).out_features if name == "output" else cast(Any, linear).in_features
        return min(width, int(other))


def apply_plan(backbone: nn.Module, plan: PrunePlan, lora: RankConfig | None) -> dict[str, LoRA]:
    """Prune a whole backbone and hook LoRA on what is left, in place; nothing is touched unless all of it fits.

    An attention without heads gets no LoRA.

    Args:
        backbone: a bare model of transformers, nothing removed yet.
        plan: the decisions.
        lora: how LoRA is made, by the random state of now; None: none is attached.

    Returns:
        The new modules by their path inside the backbone.

    Raises:
        UsageError: if the plan does not fit.
    """
    plan.check(backbone)
    prune_units(backbone, plan.heads, plan.neurons)
    if lora is None:
        return {}
    added: dict[str, LoRA] = {}
    for path, site in attention_sites(backbone).items():
        for linear in site.linears().values() if plan.heads[path] else ():
            module = cast(nn.Linear, backbone.get_submodule(linear))
            sizes = (module.in_features, module.out_features, plan.ranks[site.block])
            layer = LoRA(*sizes, scaling=lora.scaling, init_std=lora.init_std)
            added[add_child(backbone, linear, "loras", _NAME, layer)] = layer
            module.register_forward_hook(layer.after)
    return added
