"""Moments of adapters' neurons over unlabelled batches: what MerA's activation-based stages are told.

Each adapter reads on a forward pass of its own (``own``; all of them in one batch, a block of rows each), or all read
the bare backbone's states (``shared``). No activations are kept, only their moments (functional/moments), so that
memory does not grow with the tokens: 8 adapters of 64 neurons at 24 sites take 15 MB for distances, in fp32, and with
the merged adapter beside them 36 MB for least squares, in fp64.

Shapes: n adapters, B rows, L tokens, R neurons.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck as Neurons
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.hooks import SiteLayer
from peft_lightning.layers.lora import LoRA
from peft_lightning.layers.side_by_side import SideBySide, attach_side_by_side
from peft_lightning.layers.sites import find_sites, hook

__all__ = ["Calibration", "Observed"]

_DTYPES = {"pre": torch.float32, "post": torch.float64}  # distances do with fp32, least squares do not


@dataclass(frozen=True)
class Observed:
    """What a pass has seen.

    Attributes:
        pre: moments before the nonlinearity by site; empty where they were not asked for.
        post: moments after it.
        tokens: over all ranks.
    """

    pre: dict[str, Moments]
    post: dict[str, Moments]
    tokens: int

    @property
    def nbytes(self) -> int:
        """Memory of all moments."""
        return sum(moments.nbytes for moments in (*self.pre.values(), *self.post.values()))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where activations come from.

    Attributes:
        backbone: a model of transformers; it is not changed, and adapters that it has take no part.
        kind: of the adapters.
        nonlinearity: of the adapters.
        batches: gives an iterable of model inputs, anew for each pass; padding is where ``attention_mask`` is 0.
        shared: whether all adapters read the bare backbone's states.
        summed: adds a tensor up over all ranks.
    """

    backbone: nn.Module
    kind: str
    nonlinearity: str
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    shared: bool = False
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @torch.no_grad()
    def observe(
        self, groups: Sequence[Mapping[str, Neurons]], sides: Sequence[str], tokens: int, *, whole: bool = True
    ) -> Observed:
        """Go through the data once.

        Args:
            groups: for each adapter its layers by site.
            sides: pre, post or both: of what moments are taken.
            tokens: read at least so many, if there are as many.
            whole: read whole batches, so that several ranks see what one would; False: no more rows than it takes.

        Raises:
            UsageError: if the adapters' sites are none of the backbone's, or there is no token.
        """
        model = _bare_copy(self.backbone)
        device = next(model.parameters()).device
        layers = [_layers(group, self.nonlinearity, device) for group in groups]
        if self.shared:
            sites: Mapping[str, SideBySide | _Reader] = _attach_readers(model, self.kind, layers)
        else:
            sites = attach_side_by_side(model, self.kind, layers)
        sizes = [next(iter(group.values())).size for group in groups]
        moments = {side: {path: Moments(sizes, _DTYPES[side], device) for path in sites} for side in sides}
        masks: dict[str, Tensor | None] = {}
        for path, site in sites.items():
            site.observer = _Observer(path, moments, masks)
        seen = 0
        for inputs in self._inputs(model, tokens, whole, device):
            seen = inputs.seen
            if inputs.values:
                masks.update(inputs.masks(sites))
                model(**(inputs.values if self.shared else _repeated(inputs.values, len(groups))))
        if not seen:
            raise UsageError("there are no activations: the data hold no token, or all of it is padding")
        for part in (part for by_site in moments.values() for one in by_site.values() for part in one.sums()):
            part.copy_(self.summed(part))
        return Observed(moments.get("pre", {}), moments.get("post", {}), seen)

    def _inputs(self, model: nn.Module, tokens: int, whole: bool, device: torch.device) -> Iterator[_Inputs]:
        """This rank's batches until all ranks together have the tokens; empty ones where only other ranks go on."""
        known = set(inspect.signature(model.forward).parameters)
        ranks = int(self.summed(torch.ones((), dtype=torch.int64, device=device)))
        iterator, seen = iter(self.batches()), 0
        while seen < tokens:
            batch = next(iterator, None)
            values = {} if batch is None else {name: batch[name] for name in batch if name in known}
            values = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}
            if values and not whole:
                values = _first_rows(values, -(-(tokens - seen) // ranks))
            own = torch.tensor([_count(values), int(batch is not None)], dtype=torch.int64, device=device)
            count, alive = self.summed(own).tolist()
            if not alive:
                return
            seen += count
            yield _Inputs(values, seen)


@dataclass(frozen=True)
class _Inputs:
    """A batch of model inputs, and the tokens of all ranks up to it."""

    values: dict[str, Any]
    seen: int

    def masks(self, sites: Iterable[str]) -> dict[str, Tensor | None]:
        """For each site, bool ``[B, L]``: which tokens count there; None: all."""
        masks = {}
        for path in sites:
            decoded = path.startswith("decoder.") and "decoder_input_ids" in self.values
            mask = self.values.get("decoder_attention_mask" if decoded else "attention_mask")
            masks[path] = None if mask is None else mask.bool()
        return masks


@dataclass(frozen=True)
class _Observer:
    """Takes what a site's adapters compute into their moments."""

    path: str
    moments: Mapping[str, Mapping[str, Moments]]
    masks: Mapping[str, Tensor | None]

    def __call__(self, before: list[Tensor], after: list[Tensor]) -> None:
        for side, values in (("pre", before), ("post", after)):
            if side in self.moments:
                self.moments[side][self.path].add(values, self.masks[self.path])


class _Reader(SiteLayer):
    """Adapters of one site that read its states and add nothing."""

    def __init__(self, adapters: Sequence[Bottleneck]) -> None:
        super().__init__()
        self._unregistered = tuple(adapters)
        self.observer: Callable[[list[Tensor], list[Tensor]], None] | None = None

    def plus(self, base_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        """The base."""
        assert self.observer is not None
        before = [adapter.adapter_down[0](input_BLD) for adapter in self._unregistered]
        pairs = zip(self._unregistered, before, strict=True)
        self.observer(before, [adapter.adapter_down[1](inner) for adapter, inner in pairs])
        return base_BLD


def _attach_readers(backbone: nn.Module, kind: str, groups: Sequence[Mapping[str, Bottleneck]]) -> dict[str, _Reader]:
    sites = {site.path: site for site in find_sites(backbone, kind, cross=kind == "houlsby")}
    if odd := [path for path in groups[0] if path not in sites]:
        raise UsageError(f"the adapters' sites must be sites of the backbone; {odd[0]} is not")
    readers = {path: _Reader([group[path] for group in groups]) for path in sites if path in groups[0]}
    for path, reader in readers.items():
        hook(backbone, sites[path], reader)
    return readers


def _bare_copy(backbone: nn.Module) -> nn.Module:
    """The same structure over the same tensors, in evaluation mode, without what adapters have hooked on it.

    Other hooks stay, and what they belong to is not copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    for module in backbone.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            others = [(key, call) for key, call in hooks.items() if not isinstance(getattr(call, "__self__", 0), _OURS)]
            memo[id(hooks)] = OrderedDict(others)
    return copy.deepcopy(backbone, memo).eval()


_OURS = (SiteLayer, LoRA)


def _layers(group: Mapping[str, Neurons], nonlinearity: str, device: torch.device) -> dict[str, Bottleneck]:
    """Frozen modules that compute what plain tensors say."""
    first = next(iter(group.values()))
    with torch.random.fork_rng(devices=[]):
        template = Bottleneck(
            first.down_RD.shape[1],
            first.size,
            nonlinearity=nonlinearity,
            scaling=first.scaling,
            masked=any(neurons.down_mask_RD is not None for neurons in group.values()),
        ).requires_grad_(False)
    layers = {}
    for path, neurons in group.items():
        state = {
            "adapter_down.0.weight": neurons.down_RD,
            "adapter_down.0.weight_mask": neurons.down_mask_RD,
            "adapter_down.0.bias": neurons.down_bias_R,
            "adapter_up.weight": neurons.up_DR,
            "adapter_up.weight_mask": neurons.up_mask_DR,
            "adapter_up.bias": neurons.up_bias_D,
        }
        there = {name: tensor.to(device) for name, tensor in state.items() if tensor is not None}
        layers[path] = copy.deepcopy(template).to(device)
        layers[path].load_state_dict(there, strict=False, assign=True)
    return layers


def _repeated(inputs: Mapping[str, Any], times: int) -> dict[str, Any]:
    """A batch with all its rows as many times, one block after the other."""
    return {
        name: value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
        for name, value in inputs.items()
    }


def _count(inputs: Mapping[str, Any]) -> int:
    """Tokens that are no padding."""
    if not inputs:
        return 0
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def _first_rows(inputs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """As few rows as hold so many tokens, or all."""
    mask = inputs.get("attention_mask")
    per_row = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    enough = per_row.flatten(1).sum(1).cumsum(0) >= tokens
    rows = int(enough.int().argmax()) + 1 if bool(enough.any()) else len(enough)
    return {name: v[:rows] if isinstance(v, Tensor) and v.ndim else v for name, v in inputs.items()}
