"""What the losses of several kinds of task share: their precision, and the weights of classes.

Shapes: C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_lightning.errors import UsageError

__all__ = ["float32", "no_weights", "weights_for"]


def float32(outputs: Tensor) -> Tensor:
    """Return ``outputs`` in float32, or as they are where they are more exact."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def weights_for(outputs: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return the weight of each class of ``outputs`` [..., C], on their device and in their precision: [C]."""
    return outputs.new_ones(outputs.shape[-1]) if class_weights is None else class_weights.to(outputs)


def no_weights(class_weights: Tensor | None, kind: str) -> None:
    """Refuse weights of classes where there are no classes.

    Raises:
        UsageError: there are weights.
    """
    if class_weights is not None:
        raise UsageError(f"class_weights is set; allowed for kind {kind}: null")
