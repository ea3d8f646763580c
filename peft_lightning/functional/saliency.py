"""Scores that say how much each weight matters at initialisation (SparseAdapter, section 2.2).

Symbols: ``w`` = weights, ``g`` = gradient of the mean loss. Two scores so far:

* magnitude, z = |w| (Frankle et al., 2021);
* SNIP, z = |w * g| (Lee et al., 2019): the size of the loss's first-order change when an entry is masked, since
  dL/dm = w * g at m = 1. The paper prints ``z = -w * g, remove the highest``, which contradicts its own words
  ("prunes the weights with the lowest effect on the loss"); like its released code we rank by the absolute value.

Scores are computed in fp32 whatever the weights' dtype: products of two small bf16 numbers underflow and tie.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["magnitude", "snip"]


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
