"""A model held still while it is measured: gradients of the model as it is, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["held_still"]


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in fp32 throughout, without compiled graphs; afterwards all is as it was.

    Half-precision tensors become fp32, which loses nothing on the way back; autocast is off; ``torch.compile``d parts
    run as plain modules, since compiled graphs cannot be differentiated twice. The values of all parameters that train
    are restored, so they may be changed meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = {module: module._compiled_call_impl for module in model.modules()}
    values = {parameter: parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad}
    tensors = [*model.parameters(), *model.buffers()]
    halves = {tensor: tensor.dtype for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)}
    device = next((tensor.device.type for tensor in tensors), "cpu")
    model.eval()
    try:
        for module in compiled:
            module._compiled_call_impl = None
        for tensor in halves:
            tensor.data = tensor.data.float()
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for tensor, dtype in halves.items():
            tensor.data = tensor.data.to(dtype)
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        for module, mode in modes.items():
            module.training = mode
            module._compiled_call_impl = compiled[module]
