"""Prefixes (Li and Liang, 2021; He et al., 2022, table 1): attention looks at l more keys and values.

    softmax(q [P_k; K]^T / sqrt(d)) [P_v; V]

Symbols: ``P_k``, ``P_v`` [l, D] are split into heads as keys and values are. They are parameters themselves (no
network computes them) and may carry masks. Shapes: B batch, L tokens, H heads, D model width, l prefix positions.

An attention module is reached through the interface that transformers offers for attention functions, so no model
code is replaced; the function is registered under a name of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_lightning.errors import UsageError
from peft_lightning.layers.masked import Masked

__all__ = ["Prefix", "enable_prefixes"]

_NAME = "peft_lightning_prefix"


class Prefix(Masked):
    """Keys and values that every query sees; a child of an attention module.

    Args:
        width: D.
        length: l, number of positions.
        init_std: standard deviation at initialisation.
        masked: whether both matrices carry masks.
    """

    def __init__(self, width: int, length: int, *, init_std: float = 0.02, masked: bool = False) -> None:
        super().__init__()
        self.prefix_key = nn.Parameter(torch.empty(length, width))
        self.prefix_value = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.prefix_key, std=init_std)
        nn.init.normal_(self.prefix_value, std=init_std)
        self.add_masks(masked)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in another process, attention must know its function there too."""
        super().__setstate__(state)
        _register()

    def prunable_names(self) -> tuple[str, ...]:
        """Both matrices."""
        return ("prefix_key", "prefix_value")

    def extend(self, key_BHLD: Tensor, value_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix before keys and values ``[B, H, L, D / H]``."""
        batch, heads, _, size = key_BHLD.shape
        extended = []
        for name, tensor in (("prefix_key", key_BHLD), ("prefix_value", value_BHLD)):
            own = self.effective(name).to(tensor.dtype).unflatten(1, (heads, size)).transpose(0, 1)
            extended.append(torch.cat([own.expand(batch, -1, -1, -1), tensor], dim=2))
        return extended[0], extended[1]


def enable_prefixes(backbone: nn.Module) -> None:
    """Make a backbone's attention look for prefixes in its modules.

    Raises:
        UsageError: if the backbone computes attention otherwise than by ``sdpa``, or looks back only.
    """
    config: Any = backbone.config
    if config._attn_implementation == _NAME:
        return
    if config._attn_implementation != "sdpa":
        raise UsageError(
            f"backbone.attention = {config._attn_implementation!r}: prefixes (adapter.kind = mam) need sdpa"
        )
    if config.is_decoder:  # without a mask, which key a query may see is counted from the first key
        raise UsageError("backbone.config.is_decoder = True: prefixes (adapter.kind = mam) need attention both ways")
    _register()
    config._attn_implementation = _NAME


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for prefix in getattr(module, "prefixes", {}).values():
        before = key.shape[2]
        key, value = prefix.extend(key, value)
        if attention_mask is not None:
            seen = 1.0 if attention_mask.dtype == torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (key.shape[2] - before, 0), value=seen)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
