"""Scores that say how much each weight matters at initialisation (SparseAdapter, section 2.2); the highest are kept.

Symbols: ``w`` = weights, ``g`` = gradient and ``H`` = Hessian of the mean loss, both from
:mod:`peft_lightning.functional.gradients`. The paper's five, the highest kept:

* random, z ~ U(0, 1);
* magnitude, z = |w| (Frankle et al., 2021);
* Erdos-Renyi (Mocanu et al., 2018): random scores under a count for each tensor, which is what
  :func:`peft_lightning.functional.sparsify.erdos_renyi_counts` gives;
* SNIP, z = |w * g| (Lee et al., 2019): the size of the loss's first-order change when an entry is masked, since
  dL/dm = w * g at m = 1. The paper prints ``z = -w * g, remove the highest``, which contradicts its own words
  ("prunes the weights with the lowest effect on the loss"); like its released code we rank by the absolute value;
* GraSP, z = w * Hg (Wang et al., 2020): removing an entry, a step of -w, changes the squared norm of the gradient by
  -2 w * Hg to first order; what would shrink it most is kept. The paper prints -w * Hg and removes the highest: the
  same order.

Scores are computed in fp32 whatever the weights' dtype: products of two small bf16 numbers underflow and tie.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["fill_zeros_", "grasp", "magnitude", "random_scores", "snip"]


def random_scores(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Scores that ignore the weights: U(0, 1), drawn on the CPU so that every device gets the same.

    Args:
        weights: name -> tensor of any shape and dtype; the order of the names decides who gets which draws.
        seed: of the draws.

    Returns:
        name -> fp32 scores of the same shape, on the weight's device.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in weights.items()}


def magnitude(weight: Tensor) -> Tensor:
    """Magnitude score.

    Args:
        weight: any shape, any float dtype.

    Returns:
        fp32 scores of the same shape.
    """
    return weight.detach().float().abs()


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """SNIP's connection sensitivity (Lee et al., 2019, equation 6, not normalised: a constant factor ranks alike).

    Args:
        weight: any shape, any float dtype.
        gradient: gradient of the mean loss over the scoring examples with respect to ``weight``, same shape.

    Returns:
        fp32 scores of the same shape.
    """
    return (weight.detach().float() * gradient.detach().float()).abs()


def grasp(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """GraSP's gradient flow (Wang et al., 2020), its sign turned so that the highest are kept.

    Args:
        weight: any shape, any float dtype.
        hessian_gradient: the part of H g that belongs to ``weight``, same shape.

    Returns:
        fp32 scores of the same shape, of either sign.
    """
    return weight.detach().float() * hessian_gradient.detach().float()


@torch.no_grad()
def fill_zeros_(weights: Mapping[str, Tensor], std: float, seed: int) -> None:
    """Give tensors that are all zero, such as LoRA's B, values that can be scored; the others stay as they are.

    Args:
        weights: name -> tensor, changed in place.
        std: standard deviation of the values, drawn on the CPU from a normal distribution.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        if not weight.any():
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
