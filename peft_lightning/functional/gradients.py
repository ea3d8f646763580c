"""Gradient and Hessian-gradient product of a mean loss over several batches and ranks (SNIP and GraSP need them).

Symbols: batch b has the loss ``l_b``, a sum over its examples, and the weight ``n_b``; L = sum_b l_b / sum_b n_b over
all batches of all ranks, so that examples count alike however unevenly they are batched. ``g`` = dL/dw,
H = d2L/dw2 = sum_b d2 l_b/dw2 / sum_b n_b.

GraSP (Wang et al., 2020, algorithm 2) in two passes over the batches: the first gives g, the second sums
d<dl_b/dw, g>/dw with g held constant. That is exact, by differentiating twice, and no graph outlives its batch.

``.grad`` is never touched. Sums are in fp32 at least, whatever the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_lightning.errors import UsageError

__all__ = ["hessian_gradient", "mean_gradients"]

B = TypeVar("B")
BatchLoss = Callable[[B], tuple[Tensor, Tensor]]
Reduce = Callable[[Tensor], Tensor]


def mean_gradients(
    batch_loss: BatchLoss[B], weights: Mapping[str, Tensor], batches: Iterable[B], reduce: Reduce
) -> dict[str, Tensor]:
    """Gradient of the mean loss, g.

    Args:
        batch_loss: batch -> (sum of its examples' losses, sum of their weights), two scalars.
        weights: name -> tensor that requires a gradient. One that the loss does not depend on gets zeros.
        batches: this rank's batches; ranks may have different numbers of them.
        reduce: tensor -> its sum over all ranks (the identity for one process).

    Returns:
        name -> gradient of the same shape and device, fp32 (fp64 for fp64 weights).

    Raises:
        UsageError: if there is no batch, or their weights sum to 0.
    """
    return _mean_gradients(batch_loss, weights, batches, reduce)[0]


def hessian_gradient(
    batch_loss: BatchLoss[B], weights: Mapping[str, Tensor], batches: Iterable[B], reduce: Reduce
) -> dict[str, Tensor]:
    """Product H g of the mean loss's Hessian over all ``weights`` together and its gradient.

    Args:
        batch_loss: batch -> (sum of its examples' losses, sum of their weights), two scalars; called twice for each
            batch, and must give the same both times (eval mode). Scaled dot product attention runs as plain matrix
            products in the second pass: the fused kernels cannot be differentiated twice.
        weights: name -> tensor that requires a gradient.
        batches: this rank's batches, which can be gone through twice (a list, not an iterator).
        reduce: tensor -> its sum over all ranks (the identity for one process).

    Returns:
        name -> its part of H g, of the same shape and device, fp32 (fp64 for fp64 weights).

    Raises:
        UsageError: if there is no batch, their weights sum to 0, or ``batches`` is an iterator.
    """
    if iter(batches) is batches:
        raise UsageError(f"batches = {type(batches).__name__}: must be a list, since it is gone through twice")
    gradients, total = _mean_gradients(batch_loss, weights, batches, reduce)
    sums = _zeros(weights)
    for batch in batches:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss, _ = batch_loss(batch)
            first = _gradients(loss, weights, create_graph=True)
            slope = torch.stack([(a * b).sum() for a, b in zip(first, gradients.values(), strict=True)]).sum()
            _add(sums, _gradients(slope, weights))
    return {name: reduce(value) / total for name, value in sums.items()}


def _mean_gradients(
    batch_loss: BatchLoss[B], weights: Mapping[str, Tensor], batches: Iterable[B], reduce: Reduce
) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient and the sum of weights over all batches and ranks."""
    if not weights:
        raise UsageError("there is no tensor to take a gradient of")
    sums = _zeros(weights)
    total = next(iter(sums.values())).new_zeros(())
    for batch in batches:
        with torch.enable_grad():
            loss, weight = batch_loss(batch)
            _add(sums, _gradients(loss, weights))
        total += weight.detach()
    total = reduce(total)
    if not total > 0:
        raise UsageError(
            f"the batches to score on weigh {total.item():g} together: there must be training data; "
            "or choose a score that needs none (random, magnitude, er)"
        )
    return {name: reduce(value) / total for name, value in sums.items()}, total


def _zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}


def _add(sums: Mapping[str, Tensor], values: Iterable[Tensor]) -> None:
    for total, value in zip(sums.values(), values, strict=True):
        total += value.detach()


def _gradients(loss: Tensor, weights: Mapping[str, Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Derivatives of a scalar; zeros where it does not depend on a weight (a loss linear in all has no second)."""
    if not loss.requires_grad:
        return tuple(torch.zeros_like(weight) for weight in weights.values())
    return torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, materialize_grads=True)
