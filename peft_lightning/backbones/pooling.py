"""Which token's state stands for a text."""

from __future__ import annotations

from typing import Any

__all__ = ["pooling"]


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
