"""Several adapters at work in one batch: each block of rows passes through an adapter of its own.

The backbone between them is shared, so that n small runs, or n adapters that read the same texts, cost one pass over
n blocks instead of n passes. Row b of block i is row ``i * B + b`` of the batch.

Shapes: n adapters, B rows of a block, L tokens, D model width, R neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.hooks import SiteLayer
from peft_lightning.layers.sites import find_sites, hook

__all__ = ["SideBySide", "attach_side_by_side"]


class SideBySide(SiteLayer):
    """Adapters of one site, each for a block of the batch.

    Args:
        adapters: at least one; they stay what and where they are, and are no submodules of this.

    Attributes:
        observer: called with every adapter's inner values before and after the nonlinearity, ``[B, L, R]`` each, in
            the order of the adapters; None: nobody looks.
        spread: int64 ``[n B]``: the row of the batch that each row of the blocks is; None: the batch is the blocks
            already.
    """

    def __init__(self, adapters: Sequence[Bottleneck]) -> None:
        super().__init__()
        self._unregistered = tuple(adapters)
        first = self._unregistered[0]
        self._alike = all(
            adapter.adapter_up.weight.shape == first.adapter_up.weight.shape
            and repr(adapter.adapter_down[1]) == repr(first.adapter_down[1])
            and adapter.scaling == first.scaling
            for adapter in self._unregistered
        )
        self.observer: Callable[[list[Tensor], list[Tensor]], None] | None = None
        self.spread: Tensor | None = None

    def plus(self, base_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        """``[n B, L, D]``: the base plus each adapter's scaled output for its block of the input.

        Raises:
            UsageError: if the batch does not fall into n blocks.
        """
        count = len(self._unregistered)
        if self.spread is not None:
            base_BLD, input_BLD = base_BLD[self.spread], input_BLD[self.spread]
        if len(input_BLD) % count:
            raise UsageError(f"a batch of {len(input_BLD)} rows does not fall into {count} blocks")
        if self._alike and self.observer is None:
            return torch.add(base_BLD, self._at_once(input_BLD), alpha=self._unregistered[0].scaling)
        blocks = zip(self._unregistered, base_BLD.chunk(count), input_BLD.chunk(count), strict=True)
        before, after, sums = [], [], []
        for adapter, base, given in blocks:
            before.append(adapter.adapter_down[0](given))
            after.append(adapter.adapter_down[1](before[-1]))
            sums.append(torch.add(base, adapter.adapter_up(after[-1]), alpha=adapter.scaling))
        if self.observer is not None:
            self.observer(before, after)
        return torch.cat(sums)

    def _at_once(self, input_BLD: Tensor) -> Tensor:
        """Outputs of adapters of one shape, as batched products, in the input's dtype."""
        dtype, count = input_BLD.dtype, len(self._unregistered)
        maps = [(adapter.adapter_down[0], adapter.adapter_up) for adapter in self._unregistered]
        downs, ups = zip(*maps, strict=True)
        rows_nND = input_BLD.reshape(count, -1, input_BLD.shape[-1])
        inner_nNR = torch.baddbmm(_biases(downs, dtype), rows_nND, _weights(downs, dtype))
        outer_nND = torch.baddbmm(
            _biases(ups, dtype), self._unregistered[0].adapter_down[1](inner_nNR), _weights(ups, dtype)
        )
        return outer_nND.reshape(input_BLD.shape)


def attach_side_by_side(
    backbone: nn.Module, kind: str, groups: Sequence[Mapping[str, Bottleneck]]
) -> dict[str, SideBySide]:
    """Let several adapters' layers work side by side on a backbone.

    Args:
        backbone: a bare model of transformers, changed in place; has no adapters yet.
        kind: of all the adapters; a bottleneck's.
        groups: for each adapter its layers, by the path of their site; all at the same sites.

    Returns:
        The new layers by their site's path.

    Raises:
        UsageError: if the adapters' sites differ, or are none of this kind's in this backbone.
    """
    sites = {site.path: site for site in find_sites(backbone, kind, cross=kind == "houlsby")}
    first = groups[0].keys()
    for group in groups:
        if group.keys() != first or not group.keys() <= sites.keys():
            odd = sorted((group.keys() ^ first) | (group.keys() - sites.keys()))
            raise UsageError(f"adapters side by side must be at the same sites of the backbone; {odd[0]} is not")
    layers = {path: SideBySide([group[path] for group in groups]) for path in sites if path in first}
    for path, layer in layers.items():
        hook(backbone, sites[path], layer)
    return layers


def _weights(linears: Sequence[nn.Module], dtype: torch.dtype) -> Tensor:
    """``[n, in, out]``, masked where they have masks."""
    return torch.stack([cast(Tensor, linear.effective("weight")) for linear in linears]).to(dtype).transpose(1, 2)  # type: ignore[operator]


def _biases(linears: Sequence[nn.Module], dtype: torch.dtype) -> Tensor:
    """``[n, 1, out]``."""
    return torch.stack([cast(Tensor, linear.bias) for linear in linears]).to(dtype).unsqueeze(1)
