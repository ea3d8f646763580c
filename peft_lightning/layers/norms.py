"""A backbone's norms, trained beside an adapter (Prune-LoRA, section 4.1.2: "the trainable param is layer norm").

Trained parameters are float32. In a backbone held in bfloat16 a norm then takes its input in float32 and gives its
output in the input's dtype; its name, and those of its parameters, stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["backbone_norms", "train_in_float32"]


def backbone_norms(backbone: nn.Module) -> dict[str, nn.Module]:
    """All LayerNorms and RMSNorms with weights, by path, in the model's order."""
    return {
        path: module
        for path, module in backbone.named_modules()
        if (isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm")))
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def train_in_float32(norm: nn.Module) -> None:
    """Hold a norm's parameters in float32, in place; where they are already, nothing changes."""
    if all(parameter.dtype == torch.float32 for parameter in norm.parameters()):
        return
    norm.float()
    norm.keeps_dtype = keeps = _KeepsDtype()
    norm.register_forward_pre_hook(keeps.before)
    norm.register_forward_hook(keeps.after)


class _KeepsDtype(nn.Module):
    """Bound methods, so that ``copy.deepcopy`` rebinds them to the copy."""

    def __init__(self) -> None:
        super().__init__()
        self._dtype = torch.float32

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._dtype = args[0].dtype
        return (args[0].float(), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self._dtype)
