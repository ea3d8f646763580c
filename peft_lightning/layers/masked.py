"""Parameters that carry a binary mask (SparseAdapter, He et al., 2022, section 2.1): w~ = w * m.

The mask of a parameter ``X`` is the persistent bool buffer ``X_mask`` beside it, True = kept. A masked entry is stored
as exact zero *and* masked in the forward pass: its gradient is exactly 0, so Adam's moments stay 0 and weight decay
multiplies 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_lightning.errors import UsageError

__all__ = ["Masked", "MaskedLinear", "MaskedParameter", "prunable"]


class Masked(nn.Module):
    """A module that owns prunable parameters, named in :meth:`prunable_names`."""

    def prunable_names(self) -> tuple[str, ...]:
        """The module's own parameters whose entries a mask may remove."""
        return ()

    @property
    def inner_unmasked(self) -> int:
        """How many of the module's other parameters grow with the adapter's inner width, at the present one."""
        return 0

    def add_masks(self, masked: bool) -> None:
        """Register the mask of every prunable parameter, all True, or None where ``masked`` is False."""
        for name in self.prunable_names():
            weight = self.get_parameter(name)
            self.register_buffer(f"{name}_mask", torch.ones_like(weight, dtype=torch.bool) if masked else None)

    def effective(self, name: str) -> Tensor:
        """The parameter that the forward pass uses, masked, in its own dtype."""
        weight: Tensor = getattr(self, name)
        mask: Tensor | None = getattr(self, f"{name}_mask")
        return weight if mask is None else weight * mask


@dataclass(frozen=True)
class MaskedParameter:
    """One prunable parameter of a module.

    Attributes:
        module: owns it.
        name: its name there.
    """

    module: Masked
    name: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.module.get_parameter(self.name)

    @property
    def mask(self) -> Tensor | None:
        """Its bool mask of the same shape, True = kept, or None."""
        mask: Tensor | None = getattr(self.module, f"{self.name}_mask")
        return mask

    def set_mask(self, mask: Tensor) -> None:
        """Install a bool mask of the weight's shape and zero the weights it removes.

        Raises:
            UsageError: if the parameter has no mask or the shape differs.
        """
        own = self.mask
        if own is None or mask.shape != own.shape:
            raise UsageError(f"a mask of shape {tuple(mask.shape)} does not fit {self.name} of {self.module}")
        own.copy_(mask)
        with torch.no_grad():
            self.weight.mul_(own)


def prunable(module: nn.Module) -> dict[str, MaskedParameter]:
    """All prunable parameters inside a module, by the name of the tensor."""
    return {
        f"{path}.{name}" if path else name: MaskedParameter(part, name)
        for path, part in module.named_modules()
        if isinstance(part, Masked)
        for name in part.prunable_names()
    }


class MaskedLinear(nn.Linear, Masked):
    """A linear layer whose weight may carry a mask; it computes in the dtype of its input.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        masked: whether the weight has a mask.
        inner: whether the output is the inner side of an adapter.
    """

    def __init__(self, in_features: int, out_features: int, *, masked: bool = False, inner: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.inner = inner
        self.add_masks(masked)

    @property
    def inner_unmasked(self) -> int:
        """The bias, where it lies on the inner side."""
        return self.out_features if self.inner else 0

    def prunable_names(self) -> tuple[str, ...]:
        """The weight; never the bias."""
        return ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in] -> [..., out]`` in the input's dtype."""
        assert self.bias is not None
        return F.linear(input, self.effective("weight").to(input.dtype), self.bias.to(input.dtype))
