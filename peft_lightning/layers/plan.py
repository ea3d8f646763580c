"""What is left of a backbone and which ranks it gets: decided once, in every file, applied before weights are loaded.

A plan names the units that each layer keeps by their numbers in the whole backbone, so it can be read without the
importance that led to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
_MOST = 10**7  # far above any model; keeps a lying file from filling the memory


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
        """Plain values, for a manifest; neurons as a bit each, the first in the highest bit of the first hex digit."""
        return {
            "heads": {path: list(kept) for path, kept in self.heads.items()},
            "neurons": {path: _to_hex(kept, self.inner[path]) for path, kept in self.neurons.items()},
            **{name: dict(getattr(self, name)) for name in ("ranks", "units", "inner")},
        }

    def counts(self) -> dict[str, int]:
        """How many heads and neurons are kept, and how many there were."""
        kept = {"heads": self.heads, "neurons": self.neurons}
        before = {"heads_before": self.units, "neurons_before": self.inner}
        return {name: sum(map(len, units.values())) for name, units in kept.items()} | {
            name: sum(counts.values()) for name, counts in before.items()
        }

    @classmethod
    def of(cls, values: Any, what: str) -> PrunePlan:
        """The plan in a manifest.

        Raises:
            CheckpointError: if it is malformed; ``what`` is the file's name.
        """
        if not isinstance(values, dict) or values.keys() != {"heads", "neurons", "ranks", "units", "inner"}:
            raise CheckpointError(f"{what}: damaged (it does not say which heads were kept)")
        for name, fits in (("ranks", _is_count), ("units", _is_count), ("inner", _is_count), ("heads", _are_counts)):
            entries = values[name]
            if not isinstance(entries, dict) or not all(isinstance(p, str) and fits(e) for p, e in entries.items()):
                raise CheckpointError(f"{what}: damaged ({name} in its plan is malformed)")
        neurons, inner = values["neurons"], values["inner"]
        if not isinstance(neurons, dict) or neurons.keys() != inner.keys():
            raise CheckpointError(f"{what}: damaged (neurons in its plan is malformed)")
        return cls(
            heads={path: tuple(kept) for path, kept in values["heads"].items()},
            neurons={path: _from_hex(digits, inner[path], what) for path, digits in neurons.items()},
            **{name: dict(values[name]) for name in ("ranks", "units", "inner")},
        )

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
                    raise UsageError(
                        f"lora: rank {rank} for {linear}: must be from 1 to {smaller}, its smaller dimension"
                    )

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


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _to_hex(kept: Sequence[int], count: int) -> str:
    chosen = set(kept)
    bits = "".join("1" if number in chosen else "0" for number in range(count))
    return "".join(f"{int(bits[start : start + 4].ljust(4, '0'), 2):x}" for start in range(0, count, 4))


def _from_hex(digits: Any, count: int, what: str) -> tuple[int, ...]:
    if not isinstance(digits, str) or len(digits) != -(-count // 4) or not set(digits) <= set("0123456789abcdef"):
        raise CheckpointError(f"{what}: damaged (neurons in its plan must be {-(-count // 4)} hex digits)")
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)
    if "1" in bits[count:]:
        raise CheckpointError(f"{what}: damaged (neurons in its plan has more than {count})")
    return tuple(number for number, bit in enumerate(bits) if bit == "1")
