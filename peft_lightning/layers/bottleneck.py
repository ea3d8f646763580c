"""Bottleneck adapters and the three places where they compute (Houlsby 2019, Pfeiffer 2020, He 2022).

    f(h) = W_up a(W_down h + b_down) + b_up

    sequential     h <- h + c f(h)                  after a block, before the residual sum (Houlsby et al., 2019)
    around a norm  LN(s) <- LN(s + c f(LN(s)))      s = the sum that the layer's last norm gets (Pfeiffer et al., 2020)
    parallel       F(x) <- F(x) + c f(x)            beside the feed-forward block F (He et al., 2022, table 1)

Symbols: ``a`` = nonlinearity, ``c`` = scaling. Shapes: B batch, L tokens, D model width, R bottleneck. Submodule names
are AdapterHub's (``adapter_down.0``, ``adapter_up``). Both matrices start from a normal distribution, biases from 0.
Unlike SparseAdapter's released code there is no LayerNorm on the input. Where norms come first (Llama, Qwen) there is
none at a layer's end: Pfeiffer's adapter then follows the layer, ``h + c f(h)``, and the parallel one gets what the
feed-forward block gets, which is normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.layers.hooks import SiteLayer
from peft_lightning.layers.masked import MaskedLinear

__all__ = ["NONLINEARITIES", "Bottleneck"]

NONLINEARITIES: dict[str, Any] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "identity": nn.Identity,
}


class Bottleneck(SiteLayer):
    """A bottleneck adapter; one of its hooks ties it to a place in a backbone.

    Args:
        width: D, width of the hidden states.
        bottleneck: R, at least 1.
        nonlinearity: one of :data:`NONLINEARITIES`.
        scaling: c, the factor of the adapter's output.
        init_std: standard deviation of both matrices at initialisation.
        masked: whether both matrices carry masks.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        *,
        nonlinearity: str = "relu",
        scaling: float = 1.0,
        init_std: float = 0.02,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.adapter_down = nn.Sequential(
            MaskedLinear(width, bottleneck, masked=masked, inner=True), NONLINEARITIES[nonlinearity]()
        )
        self.adapter_up = MaskedLinear(bottleneck, width, masked=masked)
        for module in self.modules():
            if isinstance(module, MaskedLinear):
                nn.init.normal_(module.weight, std=init_std)
                nn.init.zeros_(module.bias)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """``[B, L, D] -> [B, L, D]``: the input plus the adapter's output, in the input's dtype."""
        return self.plus(hidden_BLD, hidden_BLD)

    def plus(self, base_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        """``[B, L, D]``: the base plus the scaled output for the input."""
        return torch.add(base_BLD, self.adapter_up(self.adapter_down(input_BLD)), alpha=self.scaling)
