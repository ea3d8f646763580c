"""What a head or a neuron costs, in parameters or in operations of a forward pass.

With N tokens, model width D and a head of width W (its query rows; K rows each for its key and value), a head holds
(W + 2 K) D weights in, W D out and a bias per row in; it computes 2 N per weight and 4 N N W for scores and context. A
neuron holds a row of each map in, with its bias, and a column of the map out. In DeBERTa a head also compares its N
queries, and its N keys, with 2 S relative positions: 4 N S W for each of the two (content to position, position to
content), where the configuration asks for it. Operations are those of matrix products, a multiply and an add counting
as two; norms, softmax and embeddings have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites

__all__ = ["layer_flops", "unit_costs"]


def unit_costs(backbone: nn.Module, measure: str, tokens: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Costs of one unit of every layer, and of the whole.

    Args:
        backbone: a bare model of transformers.
        measure: ``params`` (the whole is the backbone with its embeddings) or ``flops`` (of its layers).
        tokens: N, length of one text; parameters do not depend on it.

    Returns:
        Path of an attention -> cost of a head, path of a layer -> cost of a neuron, and the cost of everything.

    Raises:
        UsageError: if the architecture is not known.
    """
    maps = dict(backbone.named_modules())

    def cost(path: str, side: str) -> int:
        """Of one row (one column) of a linear map."""
        linear: Any = maps[path]
        weights = linear.in_features if side == "row" else linear.out_features
        biases = int(side == "row" and linear.bias is not None)
        return weights + biases if measure == "params" else 2 * tokens * weights

    heads: dict[str, int] = {}
    for path, site in attention_sites(backbone).items():
        query, key, value, output = site.linears().values()
        positions = [f"{site.block}.{name}" for name in site.names.positions if f"{site.block}.{name}" in maps]
        wide = cost(query, "row") + cost(output, "column")
        if measure == "params":
            wide += sum(cost(name, "row") for name in positions)
        else:  # positions are projected once a batch and not once a text, but compared with every text
            wide += 4 * tokens**2 + 2 * tokens * _relative_positions(maps[path])
        heads[path] = site.width * wide + site.key_width * (cost(key, "row") + cost(value, "row"))
    neurons = {
        path: sum(cost(name, "row") for name in site.inner) + cost(site.outer, "column")
        for path, site in feed_forward_sites(backbone).items()
    }
    if measure == "params":
        return heads, neurons, sum(parameter.numel() for parameter in backbone.parameters())
    return heads, neurons, _total(backbone, heads, neurons)


def layer_flops(backbone: nn.Module, tokens: int) -> int:
    """Operations of the forward pass of all layers over one text of ``tokens`` tokens.

    Raises:
        UsageError: if the architecture is not known.
    """
    heads, neurons, total = unit_costs(backbone, "flops", tokens)
    return total


def _relative_positions(attention: Any) -> int:
    """How many relative positions a token is compared with, as a query and as a key together; 0 but in DeBERTa."""
    if not getattr(attention, "relative_attention", False):
        return 0
    return sum(2 * int(attention.pos_ebd_size) for kind in ("c2p", "p2c") if kind in attention.pos_att_type)


def _total(backbone: nn.Module, heads: Mapping[str, int], neurons: Mapping[str, int]) -> int:
    attentions, blocks = attention_sites(backbone), feed_forward_sites(backbone)
    return sum(heads[path] * site.units for path, site in attentions.items()) + sum(
        neurons[path] * site.units for path, site in blocks.items()
    )
