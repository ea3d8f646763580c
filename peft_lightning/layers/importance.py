"""Importance of a backbone's heads, neurons and blocks, measured (Prune-LoRA, section 3.1, equation 1).

For every example and unit there is a gate of 1 (functional/heads); one backward pass over a batch gives the slope of
each example's own loss at each gate. A block's gate multiplies all that the block's heads and neurons give, so by the
chain rule its slope is the sum of theirs. The sum of absolute slopes is divided by the number of tokens, as in the
paper. The backbone is not trained: no weight gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.functional.heads import gate_units
from peft_lightning.functional.sequences import sum_by_row
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites

__all__ = ["Importance", "measure_importance"]


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Equation 1, before it is normalised.

    Attributes:
        heads: path of an attention -> I ``[U]`` of its heads (or groups of heads), fp64 on the CPU.
        neurons: path of a layer -> I ``[U]`` of its neurons; empty where they were not measured.
        blocks: path of a layer -> I of the whole; empty where they were not measured.
        examples: how many rows were looked at.
        tokens: how many tokens these have, padding left out.
    """

    heads: Mapping[str, Tensor]
    neurons: Mapping[str, Tensor] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)
    examples: int
    tokens: int


def measure_importance(
    backbone: nn.Module,
    batch_loss: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Iterable[Mapping[str, Any]],
    *,
    reduce: Callable[[Tensor], Tensor],
    neurons: bool = False,
    blocks: bool = False,
) -> Importance:
    """Measure on batches of labelled examples; call it with the model held still (layers/still).

    Args:
        backbone: runs inside ``batch_loss``.
        batch_loss: batch -> (sum of its examples' losses, sum of their weights), two scalars.
        batches: this rank's, with ``inputs`` that hold an ``attention_mask`` ``[N, L]``, and ``sequences`` where an
            example is several sequences; ranks may have different numbers of them.
        reduce: tensor -> its sum over all ranks (the identity for one process).
        neurons: whether the feed-forward blocks' neurons are measured.
        blocks: whether whole blocks are.

    Raises:
        UsageError: if there is no batch, or the architecture is not known.
    """
    places = {
        f"head:{path}": (site.linears()["output"], site.units) for path, site in attention_sites(backbone).items()
    }
    owners = {f"head:{path}": site.block for path, site in attention_sites(backbone).items()}
    if neurons or blocks:
        for path, site in feed_forward_sites(backbone).items():
            places[f"neuron:{path}"] = (site.outer, site.units if neurons else min(1, site.units))
            owners[f"neuron:{path}"] = path
    device = next(backbone.parameters()).device
    sums = {name: torch.zeros(units, dtype=torch.float64, device=device) for name, (_, units) in places.items()}
    whole = {path: torch.zeros(1, dtype=torch.float64, device=device) for path in dict.fromkeys(owners.values())}
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        slopes = {
            name: sum_by_row(slope_NU, batch["inputs"])
            for name, slope_NU in _slopes(backbone, batch_loss, batch, places).items()
        }
        together: dict[str, Tensor] = {}
        for name, slope_BU in slopes.items():
            sums[name] += slope_BU.double().abs().sum(0)
            together[owners[name]] = together.get(owners[name], 0) + slope_BU.double().sum(1)
        for path, slope_B in together.items():
            whole[path] += slope_B.abs().sum()
        tokens = int(batch["inputs"]["attention_mask"].sum())
        rows = len(batch["inputs"].get("sequences", batch["inputs"]["attention_mask"]))
        counts += torch.tensor([rows, tokens], dtype=torch.float64, device=device)
    # one message for all
    flat = reduce(torch.cat([*sums.values(), *whole.values(), counts])).cpu()
    *parts, counts = flat.split([*(len(total) for total in sums.values()), *(1 for _ in whole), 2])
    examples, tokens = (int(count) for count in counts)
    if not tokens:
        raise UsageError("importance: there is no example to measure on; there must be training data")
    shares = dict(zip([*sums, *whole], (part / tokens for part in parts), strict=True))
    found = {kind: _of(shares, f"{kind}:") for kind in ("head", "neuron")}
    return Importance(
        heads=found["head"],
        neurons=found["neuron"] if neurons else {},
        blocks={path: float(shares[path]) for path in whole} if blocks else {},
        examples=examples,
        tokens=tokens,
    )


def _slopes(
    backbone: nn.Module, batch_loss: Callable[[Any], tuple[Tensor, Tensor]], batch: Any, places: Mapping[str, Any]
) -> dict[str, Tensor]:
    """d l / d xi of every sequence and unit, ``[N, U]`` per place."""
    with torch.enable_grad(), _gated(backbone, places) as gates:
        loss, _ = batch_loss(batch)
        slopes = torch.autograd.grad(loss, list(gates.values()), materialize_grads=True)
    return dict(zip(gates, slopes, strict=True))


@contextmanager
def _gated(backbone: nn.Module, places: Mapping[str, tuple[str, int]]) -> Iterator[dict[str, Tensor]]:
    """Gates before linear maps, made anew by each forward pass."""
    gates: dict[str, Tensor] = {}

    def gate(name: str, units: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        value = args[0]
        gates[name] = torch.ones(len(value), units, dtype=value.dtype, device=value.device, requires_grad=True)
        return (gate_units(value, gates[name]), *args[1:])

    handles = [
        backbone.get_submodule(linear).register_forward_pre_hook(partial(gate, name, units))
        for name, (linear, units) in places.items()
        if units
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _of(shares: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(kind): part for name, part in shares.items() if name.startswith(kind)}
