"""Where the parts of an architecture family live: one row per ``model_type`` of transformers.

A row names submodules only; what is done with them is a layer's or a method's business. ``{i}`` is the layer number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft_lightning.errors import UsageError

__all__ = ["FAMILIES", "Family", "Place", "family_of", "pooling"]


@dataclass(frozen=True)
class Place:
    """A point of a transformer layer where an adapter computes, relative to the layer ("" is the layer itself).

    Attributes:
        owner: submodule that gets the adapter as a child.
        hook: submodule whose call the adapter changes.
        how: name of the adapter's hook.
        last: where no submodule spans the feed-forward block, its last map; ``hook`` is then its first.
    """

    owner: str
    hook: str
    how: str = "after"
    last: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Submodule names of one architecture family, relative to the bare model.

    Attributes:
        stacks: path of a transformer layer and the configuration's name for their number, for each stack.
        sequential: where an adapter follows a block, before the residual sum: attention, feed-forward.
        closing: the end of a layer; its hook is the LayerNorm after the residual sum, or the layer where the norms
            come first.
        parallel: where an adapter runs beside the feed-forward block.
        linears: the linear maps of a layer.
        query_value: those of them that project to queries and to values.
        prefixes: the attention module that takes prefixes, or None.
    """

    stacks: tuple[tuple[str, str], ...]
    sequential: tuple[Place, ...]
    closing: Place
    parallel: Place
    linears: tuple[str, ...]
    query_value: tuple[str, str]
    prefixes: str | None = None

    def layers(self, config: Any) -> Iterator[str]:
        """Paths of all transformer layers, in order."""
        for path, count in self.stacks:
            yield from (path.format(i=i) for i in range(getattr(config, count)))


_BERT = Family(
    stacks=(("encoder.layer.{i}", "num_hidden_layers"),),
    sequential=(Place("attention.output", "attention.output.dropout"), Place("output", "output.dropout")),
    closing=Place("output", "output.LayerNorm", "around_norm"),
    parallel=Place("output", "output", "beside_residual"),
    linears=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    query_value=("attention.self.query", "attention.self.value"),
    prefixes="attention.self",
)
_DEBERTA = replace(
    _BERT,
    linears=tuple(f"{name}_proj" if name.startswith("attention.self.") else name for name in _BERT.linears),
    query_value=("attention.self.query_proj", "attention.self.value_proj"),
    prefixes=None,
)
_BART = Family(
    stacks=(("encoder.layers.{i}", "encoder_layers"), ("decoder.layers.{i}", "decoder_layers")),
    # The hidden dropout is a function here, so an adapter comes before it. Cross-attention has none, as in AdapterHub.
    sequential=(Place("self_attn.out_proj", "self_attn.out_proj"), Place("fc2", "fc2")),
    closing=Place("final_layer_norm", "final_layer_norm", "around_norm"),
    parallel=Place("fc2", "fc1", "beside_remembered", "fc2"),
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    query_value=("self_attn.q_proj", "self_attn.v_proj"),
)
_LLAMA = Family(
    stacks=(("layers.{i}", "num_hidden_layers"),),
    sequential=(Place("self_attn.o_proj", "self_attn.o_proj"), Place("mlp.down_proj", "mlp.down_proj")),
    closing=Place("", ""),
    parallel=Place("mlp", "mlp", "beside"),
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    query_value=("self_attn.q_proj", "self_attn.v_proj"),
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": replace(_BERT, prefixes=None),
    "deberta-v2": _DEBERTA,
    "bart": _BART,
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def family_of(model_type: str) -> Family:
    """The row of an architecture.

    Raises:
        UsageError: if there is none yet; names those that exist.
    """
    if model_type not in FAMILIES:
        raise UsageError(
            f"backbone of type {model_type!r}: adapters know where to attach in {', '.join(FAMILIES)} only"
        )
    return FAMILIES[model_type]


def pooling(config: Any) -> str:
    """The token that stands for a text: ``first``, or ``last`` where attention only looks back or a decoder answers."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return "last"
    kind = config.model_type
    only_back = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if only_back else "first"
