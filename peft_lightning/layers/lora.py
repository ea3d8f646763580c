"""LoRA (Hu et al., 2021, arXiv:2106.09685, equation 3): y <- W x + b + c B A x.

Symbols: ``c`` = scaling = alpha / r; ``A`` [r, in] starts from a normal distribution, ``B`` [out, r] from 0, so the
model is unchanged at first. (SparseAdapter's released code starts ``B`` away from 0.) Either matrix may carry a mask.
Parameter names are AdapterHub's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_lightning.layers.masked import Masked

__all__ = ["LoRA"]


class LoRA(Masked):
    """A low-rank update that is hooked on a linear layer.

    Args:
        in_features: width of the linear layer's input.
        out_features: width of its output.
        rank: r.
        scaling: c.
        init_std: standard deviation of A at initialisation.
        masked: whether both matrices carry masks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scaling: float = 1.0,
        init_std: float = 0.02,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.merged = False
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.normal_(self.lora_A, std=init_std)
        self.add_masks(masked)

    def prunable_names(self) -> tuple[str, ...]:
        """Both matrices."""
        return ("lora_A", "lora_B")

    @torch.no_grad()
    def merge(self, linear: nn.Linear) -> None:
        """Fold the update into the linear layer's weight, W + c B A, in place; a second time nothing happens.

        The sum is taken in fp64 and rounded once, to the weight's dtype.

        Args:
            linear: the layer that this one is hooked on.
        """
        if self.merged:
            return
        a, b = (self.effective(name).double() for name in ("lora_A", "lora_B"))
        linear.weight.copy_(linear.weight.double() + self.scaling * b @ a)
        self.merged = True

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the linear layer: one product, one product that also scales and adds."""
        if self.merged:
            return output
        input_NI = args[0].flatten(0, -2)
        inner_NR = F.linear(input_NI, self.effective("lora_A").to(input_NI.dtype))
        up_RO = self.effective("lora_B").to(input_NI.dtype).t()
        return torch.addmm(output.flatten(0, -2), inner_NR, up_RO, alpha=self.scaling).view_as(output)
