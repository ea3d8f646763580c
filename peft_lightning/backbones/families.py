"""Where the parts of an architecture family live: one row per ``model_type`` of transformers.

A row names submodules only; what is done with them is a layer's or a method's business. ``{i}`` is the layer number.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_lightning.errors import UsageError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Submodule names of one architecture family, relative to the bare encoder.

    Attributes:
        layer: path of a transformer layer.
        attention_output: sublayer that ends the attention block, relative to the layer.
        ffn_output: sublayer that ends the feed-forward block, relative to the layer.
        tail: submodule of both whose output is added to the residual stream (a sequential adapter follows it).
    """

    layer: str
    attention_output: str
    ffn_output: str
    tail: str


FAMILIES: dict[str, Family] = {
    "bert": Family(layer="encoder.layer.{i}", attention_output="attention.output", ffn_output="output", tail="dropout"),
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
