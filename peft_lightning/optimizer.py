"""The optimiser of all methods: AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from peft_lightning.settings import OptimConfig

__all__ = ["adamw"]


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig, *, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW with two groups: matrices with weight decay, vectors (biases, norms) without.

    Args:
        parameters: all that trains.
        config: its settings.
        fused: whether one kernel does it all; None: as torch decides.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )
