"""Gradient and Hessian-gradient product of a mean loss over several batches and ranks (SNIP and GraSP need them).

Symbols: batch b has the loss ``l_b``, a sum over its examples, and the weight ``n_b``; L = sum_b l_b / sum_b n_b over
all batches of all ranks, so that examples count alike however unevenly they are batched. ``g`` = dL/dw,
H = d2L/dw2 = sum_b d2 l_b/dw2 / sum_b n_b.

GraSP (Wang et al., 2020, algorithm 2) in two passes over the batches: the first gives g, the second sums
d<dl_b/dw, g>/dw with g held constant. That is exact, by differentiating twice. No more than one batch's graph is alive
at a time: the last batch's is kept from the first pass for the second.

``.grad`` is never touched. Sums are in fp32 at least, whatever the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.twice import twice_differentiable

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
    sums, total = _zeros(weights)
    for batch in batches:
        gradients, weight = _batch_gradients(batch_loss, weights, batch)
        _add(sums, gradients)
        total += weight
    return _mean(sums, total, reduce)[0]


def hessian_gradient(
    batch_loss: BatchLoss[B], weights: Mapping[str, Tensor], batches: Sequence[B], reduce: Reduce
) -> dict[str, Tensor]:
    """Product H g of the mean loss's Hessian over all ``weights`` together and its gradient.

    Args:
        batch_loss: batch -> (sum of its examples' losses, sum of their weights), two scalars; called twice for each
            batch but the last, and must give the same both times (eval mode). In the second pass it runs inside
            :func:`peft_lightning.functional.twice.twice_differentiable`.
        weights: name -> tensor that requires a gradient.
        batches: this rank's batches.
        reduce: tensor -> its sum over all ranks (the identity for one process).

    Returns:
        name -> its part of H g, of the same shape and device, fp32 (fp64 for fp64 weights).

    Raises:
        UsageError: if there is no batch, or their weights sum to 0.
    """
    sums, total = _zeros(weights)
    first: tuple[Tensor, ...] = ()
    last = len(batches) - 1
    for number, batch in enumerate(batches):
        first, weight = _batch_gradients(batch_loss, weights, batch, twice=number == last)
        _add(sums, first)
        total += weight
    g, total = _mean(sums, total, reduce)
    products = _zeros(weights)[0]
    for batch in reversed(batches):
        first = first or _batch_gradients(batch_loss, weights, batch, twice=True)[0]
        slope = torch.stack([(a * b).sum() for a, b in zip(first, g.values(), strict=True)]).sum()
        _add(products, _gradients(slope, weights))
        first = ()
    return {name: reduce(value) / total for name, value in products.items()}


def _batch_gradients(
    batch_loss: BatchLoss[B], weights: Mapping[str, Tensor], batch: B, twice: bool = False
) -> tuple[tuple[Tensor, ...], Tensor]:
    """dl_b/dw of one batch, which with ``twice`` can be differentiated again, and the batch's weight."""
    with torch.enable_grad(), twice_differentiable() if twice else nullcontext():
        loss, weight = batch_loss(batch)
        return _gradients(loss, weights, twice), weight.detach()


def _gradients(loss: Tensor, weights: Mapping[str, Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Derivatives of a scalar; zeros where it does not depend on a weight (a loss linear in all has no second)."""
    if not loss.requires_grad:
        return tuple(torch.zeros_like(weight) for weight in weights.values())
    return torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, materialize_grads=True)


def _mean(sums: Mapping[str, Tensor], total: Tensor, reduce: Reduce) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over all ranks, divided by the weight of all ranks, and that weight."""
    total = reduce(total)
    if not total > 0:
        raise UsageError(
            f"the batches to score on weigh {total.item():g} together: there must be training data; "
            "or choose a score that needs none (random, magnitude, er)"
        )
    return {name: reduce(value) / total for name, value in sums.items()}, total


def _zeros(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Where sums start, and a scalar like them."""
    if not weights:
        raise UsageError("there is no tensor to take a gradient of")
    sums = {n: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for n, w in weights.items()}
    return sums, next(iter(sums.values())).new_zeros(())


def _add(sums: Mapping[str, Tensor], values: Iterable[Tensor]) -> None:
    for total, value in zip(sums.values(), values, strict=True):
        total += value.detach()
