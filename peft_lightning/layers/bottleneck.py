"""Bottleneck adapters (Houlsby et al., 2019) with optional weight masks (SparseAdapter, figure 3b).

    h <- h + c * (W_up a(W_down h + b_down) + b_up),    W~ = W * m

Symbols: ``h`` = hidden states, ``a`` = nonlinearity, ``c`` = scaling, ``m`` = binary mask. Shapes: B batch, L tokens,
D model width, R bottleneck. Submodule names are AdapterHub's (``adapter_down.0``, ``adapter_up``). Both matrices start
from a normal distribution, biases from 0. Unlike SparseAdapter's released code there is no LayerNorm on the input.

A masked weight is stored as exact zero *and* masked in the forward pass: its gradient is exactly 0, so Adam's moments
stay 0 and weight decay multiplies 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_lightning.errors import UsageError

__all__ = ["NONLINEARITIES", "Bottleneck", "MaskedLinear"]

NONLINEARITIES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}


class MaskedLinear(nn.Linear):
    """A linear layer whose weight may carry a binary mask; it computes in the dtype of its input.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        masked: whether the layer has a mask (all True at first), a persistent bool buffer of the weight's shape.
    """

    def __init__(self, in_features: int, out_features: int, *, masked: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.mask: Tensor | None
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool) if masked else None)

    def set_mask(self, mask: Tensor) -> None:
        """Install a bool mask of the weight's shape and zero the weights it removes.

        Raises:
            UsageError: if the layer has no mask or the shape differs.
        """
        if self.mask is None or mask.shape != self.weight.shape:
            raise UsageError(f"a mask of shape {tuple(mask.shape)} does not fit {self}")
        self.mask.copy_(mask)
        with torch.no_grad():
            self.weight.mul_(self.mask)

    def effective_weight(self) -> Tensor:
        """The weight that the forward pass uses, in the parameter's dtype."""
        return self.weight if self.mask is None else self.weight * self.mask

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` in the input's dtype."""
        assert self.bias is not None
        return F.linear(input, self.effective_weight().to(input.dtype), self.bias.to(input.dtype))


class Bottleneck(nn.Module):
    """A bottleneck adapter that adds itself to what it is hooked on.

    Args:
        width: D, width of the hidden states.
        bottleneck: R, at least 1.
        nonlinearity: one of :data:`NONLINEARITIES`.
        scaling: c, the factor of the adapter's output.
        init_std: standard deviation of both matrices at initialisation.
        masked: whether both matrices carry masks.

    Raises:
        UsageError: if a value is not allowed.
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
        if bottleneck < 1:
            raise UsageError(f"adapter.bottleneck = {bottleneck}: must be at least 1")
        if nonlinearity not in NONLINEARITIES:
            raise UsageError(f"adapter.nonlinearity = {nonlinearity!r}: must be one of {', '.join(NONLINEARITIES)}")
        self.scaling = scaling
        self.adapter_down = nn.Sequential(
            MaskedLinear(width, bottleneck, masked=masked), NONLINEARITIES[nonlinearity]()
        )
        self.adapter_up = MaskedLinear(bottleneck, width, masked=masked)
        for linear in self.prunable().values():
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def prunable(self) -> dict[str, MaskedLinear]:
        """The layers whose weights a mask may remove, by their name inside the adapter."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MaskedLinear)}

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """``[B, L, D] -> [B, L, D]``: the input plus the adapter's output, in the input's dtype."""
        update_BLD = self.adapter_up(self.adapter_down(hidden_BLD))
        return torch.add(hidden_BLD, update_BLD, alpha=self.scaling)

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of a submodule: replaces its output. A bound method, so ``copy.deepcopy`` rebinds it."""
        return self(output)
