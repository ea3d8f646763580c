"""What the merge benchmark compares: random adapters, a naive loop over them, and forward passes that none avoids."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ot
import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.merging import MergeSource
from peft_lightning.layers.side_by_side import attach_side_by_side

__all__ = ["Shape", "adapters", "naive_loop", "own_passes", "plain_passes"]


@dataclass(frozen=True)
class Shape:
    """Sizes of what is measured: adapters, layers (two sites each), model width, bottleneck, and a batch's rows."""

    count: int = 8
    layers: int = 12
    width: int = 768
    neurons: int = 64
    rows: int = 4
    length: int = 128

    @classmethod
    def of(cls, tiny: bool) -> Shape:
        """The shape that the goals are set for, or one that takes seconds."""
        return cls(2, 2, 32, 8, 2, 16) if tiny else cls()

    def backbone(self) -> Any:
        """A random BERT of this shape, in evaluation mode."""
        torch.manual_seed(0)
        config = {
            "model_type": "bert",
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // 64),
            "intermediate_size": 4 * self.width,
            "vocab_size": 1024,
        }
        return build_backbone(BackboneConfig(config=config, tokenizer="toy")).eval()

    def batches(self, tokens: int) -> list[dict[str, Tensor]]:
        """Batches of random tokens without padding, so many tokens in all."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(tokens // (self.rows * self.length)):
            ids = torch.randint(5, 1000, (self.rows, self.length), generator=generator)
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return found


def adapters(shape: Shape) -> list[MergeSource]:
    """Adapters of random values; no backbone is built, which would leave its traces in the allocator."""
    config = AdapterConfig(kind="houlsby", bottleneck=shape.neurons)
    parts = {
        "adapter_down.0.weight": (shape.neurons, shape.width),
        "adapter_down.0.bias": (shape.neurons,),
        "adapter_up.weight": (shape.width, shape.neurons),
        "adapter_up.bias": (shape.width,),
    }
    places = [f"encoder.layer.{n}.{place}" for n in range(shape.layers) for place in ("attention.output", "output")]
    found = []
    for number in range(shape.count):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"{place}.adapters.{config.name}.{part}": torch.randn(size, generator=generator) * 0.02
            for place in places
            for part, size in parts.items()
        }
        found.append(MergeSource(name=f"adapter {number}", adapter=config, tensors=tensors))
    return found


def naive_loop(sources: Sequence[MergeSource]) -> Callable[[], dict[str, Tensor]]:
    """Equations 3 to 5 as they are written: adapter by adapter, all differences of neurons, POT's exact transport.

    Biases are left out, as in the code that the paper builds on.
    """
    downs = [name for name in sources[0].tensors if name.endswith("adapter_down.0.weight")]

    def merge() -> dict[str, Tensor]:
        merged = {}
        for down in downs:
            up = down.replace("adapter_down.0", "adapter_up")
            first_RD, first_DR = sources[0].tensors[down], sources[0].tensors[up]
            uniform = np.ones(len(first_RD)) / len(first_RD)
            total_RD, total_DR = first_RD.clone(), first_DR.clone()
            for source in sources[1:]:
                other_RD = source.tensors[down]
                difference_RRD = other_RD.unsqueeze(1) - first_RD.unsqueeze(0)
                cost_RR = torch.sum(difference_RRD.abs() ** 2, 2) ** 0.5
                plan = ot.emd(uniform, uniform, cost_RR.double().numpy())
                move_RR = torch.from_numpy(plan).float() * len(first_RD)
                total_RD += move_RR.t() @ other_RD
                total_DR += source.tensors[up] @ move_RR
            merged[down], merged[up] = total_RD / len(sources), total_DR / len(sources)
        return merged

    return merge


def own_passes(
    backbone: nn.Module, sources: Sequence[MergeSource], batches: Sequence[Mapping[str, Tensor]]
) -> Callable[[], None]:
    """Forward passes of every adapter over the batches, as one batch of blocks, nobody looking."""
    groups = []
    for source in sources:
        layers = attach_adapters(copy.deepcopy(backbone), source.adapter, hooked=False)
        for path, layer in layers.items():
            layer.load_state_dict({name: source.tensors[f"{path}.{name}"] for name, _ in layer.named_parameters()})
        groups.append({path.partition(".adapters.")[0]: cast(Bottleneck, layer) for path, layer in layers.items()})
    backbone = copy.deepcopy(backbone)
    attach_side_by_side(backbone, "houlsby", groups)
    blocks = [{name: tensor.repeat(len(sources), 1) for name, tensor in batch.items()} for batch in batches]
    return plain_passes(backbone, blocks)


def plain_passes(backbone: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Callable[[], None]:
    """Forward passes over the batches."""

    @torch.no_grad()
    def read() -> None:
        for batch in batches:
            backbone(**batch)

    return read
