"""What an adapted backbone computes, written out once more: no hooks and no layers of the package.

``oracle`` changes a plain copy of the backbone so that its blocks follow the formulas, from the trained tensors alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]


def oracle(plain: nn.Module, tensors: Tensors, kind: str, scaling: float) -> nn.Module:
    """Return ``plain``, changed in place.

    Args:
        plain: the backbone without adapters.
        tensors: name inside the backbone -> tensor of the adapters, ``...adapters.NAME.adapter_up.weight`` and so on.
        kind: of the adapters.
        scaling: their factor.
    """
    if kind == "lora":
        for name in tensors:
            if name.endswith("lora_A"):
                linear: Any = plain.get_submodule(name.partition(".loras.")[0])
                merged = linear.weight + scaling * tensors[name.removesuffix("A") + "B"] @ tensors[name]
                linear.forward = lambda x, linear=linear, merged=merged: F.linear(x, merged, linear.bias)
        return plain
    for site in dict.fromkeys(re.split(r"\.adapters\.", name)[0] for name in tensors if ".adapters." in name):
        own = {name.removeprefix(f"{site}."): tensor for name, tensor in tensors.items() if name.startswith(f"{site}.")}
        _change(plain, site, _function(own, scaling), kind)
    for site in dict.fromkeys(name.partition(".prefixes.")[0] for name in tensors if ".prefixes." in name):
        key, value = (tensors[n] for n in sorted(n for n in tensors if n.startswith(f"{site}.prefixes.")))
        attention = plain.get_submodule(site)
        attention.forward = _prefixed(attention, key, value)
    return plain


def _function(own: Tensors, scaling: float) -> Callable[[Tensor], Tensor]:
    """c f(h) of one adapter."""
    down, down_bias, up, up_bias = (
        next(tensor for name, tensor in own.items() if name.endswith(end))
        for end in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    )
    return lambda h: scaling * ((h @ down.T + down_bias).clamp_min(0) @ up.T + up_bias)


def _change(plain: nn.Module, site: str, f: Callable[[Tensor], Tensor], kind: str) -> None:
    block: Any = plain.get_submodule(site)
    if site.endswith("_norm"):  # BART, Pfeiffer
        block.forward = lambda s: _norm(block, s + f(_norm(block, s)))
    elif hasattr(block, "LayerNorm"):  # BERT and its relatives

        def output(hidden: Tensor, residual: Tensor) -> Tensor:
            h = F.linear(hidden, block.dense.weight, block.dense.bias)
            if kind == "houlsby":
                return _norm(block.LayerNorm, h + f(h) + residual)
            if kind == "pfeiffer":
                return _norm(block.LayerNorm, h + residual + f(_norm(block.LayerNorm, h + residual)))
            return _norm(block.LayerNorm, h + residual + f(residual))

        block.forward = output
    elif kind == "houlsby":  # a linear map that ends a block
        block.forward = lambda x: (lambda h: h + f(h))(F.linear(x, block.weight, block.bias))
    elif kind == "pfeiffer":  # Llama: a whole layer
        whole = block.forward
        block.forward = lambda *args, **options: (lambda h: h + f(h))(whole(*args, **options))
    elif hasattr(block, "gate_proj"):  # Llama's feed-forward block
        block.forward = lambda x: block.down_proj(F.silu(block.gate_proj(x)) * block.up_proj(x)) + f(x)
    else:  # BART: the second map of the block; the sum with the first map's input is the layer's
        layer: Any = plain.get_submodule(site.rpartition(".")[0])
        layer.forward = _bart_layer(layer, f)


def _norm(norm: Any, s: Tensor) -> Tensor:
    centred = s - s.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    eps: float = getattr(norm, "eps", None) or norm.variance_epsilon
    return centred / torch.sqrt(variance + eps) * norm.weight + norm.bias


def _bart_layer(layer: Any, f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(
        x: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        x = _norm(layer.self_attn_layer_norm, x + layer.self_attn(x, attention_mask=attention_mask)[0])
        if encoder_hidden_states is not None:
            seen = layer.encoder_attn(x, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask)[
                0
            ]
            x = _norm(layer.encoder_attn_layer_norm, x + seen)
        inner = layer.activation_fn(F.linear(x, layer.fc1.weight, layer.fc1.bias))
        return _norm(layer.final_layer_norm, x + F.linear(inner, layer.fc2.weight, layer.fc2.bias) + f(x))

    return forward


def _prefixed(attention: Any, prefix_key: Tensor, prefix_value: Tensor) -> Callable[..., Any]:
    """He et al. 2022, equation 7: (1 - lambda) of the old attention plus lambda of attention to the prefix."""

    def forward(x: Tensor, attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
        heads, size = attention.num_attention_heads, attention.attention_head_size
        contexts = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            q, k, v = (
                F.linear(x, m.weight[part], m.bias[part]) for m in (attention.query, attention.key, attention.value)
            )
            old, new = q @ k.transpose(1, 2) / math.sqrt(size), q @ prefix_key[:, part].T / math.sqrt(size)
            if attention_mask is not None:
                allowed = attention_mask[:, 0].expand(old.shape)
                old = old.masked_fill(~allowed, -math.inf) if allowed.dtype == torch.bool else old + allowed
            share = new.exp().sum(-1) / (new.exp().sum(-1) + old.exp().sum(-1))
            to_old, to_new = old.softmax(-1) @ v, new.softmax(-1) @ prefix_value[:, part]
            contexts.append((1 - share)[..., None] * to_old + share[..., None] * to_new)
        return torch.cat(contexts, dim=-1), None

    return forward
