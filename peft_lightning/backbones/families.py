"""Where the parts of an architecture family live: one row per ``model_type`` of transformers.

A row names submodules only; what is done with them is a layer's or a method's business. ``{i}`` is the layer number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft_lightning.errors import UsageError

__all__ = ["FAMILIES", "Attention", "Family", "Place", "family_of"]


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
class Attention:
    """One multi-head attention of a layer, its parts relative to the layer.

    Attributes:
        module: the attention itself.
        query: its linear map to queries.
        key: to keys.
        value: to values.
        output: from what the heads give back to the model's width.
        positions: further maps whose rows are the heads', where they exist.
        head_size: name of the module's attribute for the width of a head.
        counts: attributes for the number of (query) heads.
        widths: attributes for all heads' width together.
        runs_empty: whether its forward pass takes no heads at all.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    positions: tuple[str, ...] = ()
    head_size: str = "head_dim"
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    runs_empty: bool = True

    @property
    def linears(self) -> tuple[str, str, str, str]:
        """Query, key, value and output."""
        return self.query, self.key, self.value, self.output


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
        attentions: the attentions of a layer; the second one is a decoder's, over what the encoder gave.
        inner: the maps into the feed-forward block; their outputs are its neurons.
        outer: the map out of it.
        prefixes: the attention module that takes prefixes, or None.
        crossing: where an adapter follows a decoder's attention to the encoder; only some layers have it.
    """

    stacks: tuple[tuple[str, str], ...]
    sequential: tuple[Place, ...]
    closing: Place
    parallel: Place
    linears: tuple[str, ...]
    query_value: tuple[str, str]
    attentions: tuple[Attention, ...]
    inner: tuple[str, ...]
    outer: str
    prefixes: str | None = None
    crossing: tuple[Place, ...] = ()

    def layers(self, config: Any) -> Iterator[str]:
        """Paths of all transformer layers, in order."""
        for path, count in self.stacks:
            yield from (path.format(i=i) for i in range(getattr(config, count)))


_SELF = Attention(
    module="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    head_size="attention_head_size",
    counts=("num_attention_heads",),
    widths=("all_head_size",),
)
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
    attentions=(_SELF,),
    inner=("intermediate.dense",),
    outer="output.dense",
    prefixes="attention.self",
)
_DEBERTA = replace(
    _BERT,
    linears=tuple(f"{name}_proj" if name.startswith("attention.self.") else name for name in _BERT.linears),
    query_value=("attention.self.query_proj", "attention.self.value_proj"),
    attentions=(
        replace(
            _SELF,
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            positions=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
            runs_empty=False,
        ),
    ),
    prefixes=None,
)


def _projections(module: str, output: str, **more: Any) -> Attention:
    query, key, value = (f"{module}.{name}_proj" for name in "qkv")
    return Attention(module=module, query=query, key=key, value=value, output=f"{module}.{output}", **more)


_BART = Family(
    stacks=(("encoder.layers.{i}", "encoder_layers"), ("decoder.layers.{i}", "decoder_layers")),
    # The hidden dropout is a function here, so an adapter comes before it. Cross-attention has one only where it is
    # asked for, as in AdapterHub.
    sequential=(Place("self_attn.out_proj", "self_attn.out_proj"), Place("fc2", "fc2")),
    crossing=(Place("encoder_attn.out_proj", "encoder_attn.out_proj"),),
    closing=Place("final_layer_norm", "final_layer_norm", "around_norm"),
    parallel=Place("fc2", "fc1", "beside_remembered", "fc2"),
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    query_value=("self_attn.q_proj", "self_attn.v_proj"),
    attentions=tuple(
        _projections(module, "out_proj", counts=("num_heads",)) for module in ("self_attn", "encoder_attn")
    ),
    inner=("fc1",),
    outer="fc2",
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
    attentions=(_projections("self_attn", "o_proj"),),
    inner=("mlp.gate_proj", "mlp.up_proj"),
    outer="mlp.down_proj",
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

_FUSED = "its query, key and value are one fused map"
_SHARED = "its first layer computes the positions' biases, one per head, for all layers"
# Architectures that people would try, and why they have no row.
_WITHOUT: dict[str, str] = {
    **dict.fromkeys(("gpt2", "gpt_neox", "gpt_bigcode", "modernbert", "phi3", "bloom", "falcon"), _FUSED),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _SHARED),
}


def family_of(model_type: str) -> Family:
    """The row of an architecture.

    Raises:
        UsageError: if there is none; gives the reason where it lies in the architecture, and names those that exist.
    """
    if model_type not in FAMILIES:
        reason = f" ({_WITHOUT[model_type]})" if model_type in _WITHOUT else ""
        raise UsageError(
            f"backbone of type {model_type!r}: adapters and pruning know their way in "
            f"{', '.join(FAMILIES)} only{reason}"
        )
    return FAMILIES[model_type]
