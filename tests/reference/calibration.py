"""Slow oracle of what adapters' neurons do: each adapter alone on its backbone, every token kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_lightning.layers.adapters import attach_adapters
from peft_lightning.layers.merging import MergeSource

__all__ = ["Seen", "alone", "look"]


@dataclass(frozen=True)
class Seen:
    """Values at one site, a row for every token that is no padding: ``[N, R]``, ``[N, R]`` and ``[N, D]``."""

    before: Tensor
    after: Tensor
    output: Tensor


def alone(bare: Any, source: Any) -> tuple[Any, dict[str, Any]]:
    """A copy of the backbone with the adapter hooked on it, and the adapter's layers by site.

    ``source`` is a MergeSource or a Merged.
    """
    model = copy.deepcopy(bare)
    layers = attach_adapters(model, source.adapter, masked=bool(source.masks))
    state = dict(model.state_dict())
    for name, tensor in source.tensors.items():
        assert name in state and state[name].shape == tensor.shape
        state[name] = tensor
    for name, mask in source.masks.items():
        state[f"{name}_mask"] = mask
    model.load_state_dict(state)
    group = ".loras." if source.adapter.kind == "lora" else ".adapters."
    return model.eval(), {path.partition(group)[0]: layer for path, layer in layers.items()}


@torch.no_grad()
def look(bare: Any, source: MergeSource, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Seen]:
    """What one adapter's neurons do on its own forward passes."""
    model, layers = alone(bare, source)
    rows: dict[str, list[list[Tensor]]] = {path: [[], [], []] for path in layers}
    caught: dict[str, list[Tensor]] = {}

    def catch(path: str, place: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            caught.setdefault(path, [torch.empty(0)] * 3)[place] = output

        return hook

    for path, layer in layers.items():
        for place, part in enumerate((layer.adapter_down[0], layer.adapter_down[1], layer.adapter_up)):
            part.register_forward_hook(catch(path, place))
    for batch in batches:
        model(**batch)
        for path, layer in layers.items():
            caught[path][2] = caught[path][2] * layer.scaling
            for b, row in enumerate(batch["attention_mask"].tolist()):
                for n, there in enumerate(row):
                    if there:
                        for place in range(3):
                            rows[path][place].append(caught[path][place][b, n])
    return {path: Seen(*(torch.stack(part).double() for part in parts)) for path, parts in rows.items()}
