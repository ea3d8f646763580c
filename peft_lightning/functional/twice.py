"""Operations of a transformer that can be differentiated twice, and cheaply.

Torch's fused attention kernels have no second derivative, and that of its GELU is put together from some thirty
elementwise operations, each with a result of the size of the widest activation. With y = GELU(x) = x Phi(x), phi and
Phi the normal density and its integral:

    y' = Phi(x) + x phi(x),    y'' = (2 - x^2) phi(x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["twice_differentiable"]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run scaled dot product attention as plain matrix products, and the exact GELU with its own second derivative.

    Values and derivatives stay what they were, up to rounding; a third derivative of GELU does not exist inside.
    """
    with sdpa_kernel(SDPBackend.MATH), _OwnGelu():
        yield


class _OwnGelu(TorchFunctionMode):
    """Sends calls of the exact GELU to the functions below, whoever makes them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.gelu and len(args) == 1 and not kwargs:
            return _Gelu.apply(args[0])
        return func(*args, **(kwargs or {}))


class _Gelu(torch.autograd.Function):
    """y = GELU(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _GeluGradient.apply(gradients[0], x)


class _GeluGradient(torch.autograd.Function):
    """r = g y'(x); its derivatives along v are v y'(x) for g and v g y''(x) for x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        square = x.square()
        # in place from here on: the activations are the largest tensors of a transformer
        second = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi)).mul_(square.neg_().add_(2))
        return torch.ops.aten.gelu_backward(v, x), second.mul_(g).mul_(v)
