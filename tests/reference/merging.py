"""Slow oracles for merged adapters: what an adapter computes, and merges written out entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_lightning.functional.lowrank import LowRank
from peft_lightning.functional.neurons import Bottleneck

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


def inner(adapter: Bottleneck, inputs_ND: Tensor) -> Tensor:
    """Pre-activations ``[N, R]``."""
    down_RD = adapter.down_RD if adapter.down_mask_RD is None else adapter.down_RD * adapter.down_mask_RD
    z_NR = inputs_ND.to(down_RD) @ down_RD.t()
    return z_NR if adapter.down_bias_R is None else z_NR + adapter.down_bias_R


def output(adapter: Bottleneck, inputs_ND: Tensor, nonlinearity: str = "relu") -> Tensor:
    """c f(x), ``[N, D]``."""
    up_DR = adapter.up_DR if adapter.up_mask_DR is None else adapter.up_DR * adapter.up_mask_DR
    result = NONLINEARITIES[nonlinearity](inner(adapter, inputs_ND)) @ up_DR.t()
    return adapter.scaling * (result if adapter.up_bias_D is None else result + adapter.up_bias_D)


def permuted(adapter: Bottleneck, order_R: Tensor) -> Bottleneck:
    """The same function, its neurons in another order."""
    masks = adapter.down_mask_RD, adapter.up_mask_DR
    return Bottleneck(
        adapter.down_RD[order_R],
        None if adapter.down_bias_R is None else adapter.down_bias_R[order_R],
        adapter.up_DR[:, order_R],
        adapter.up_bias_D,
        adapter.scaling,
        None if masks[0] is None else masks[0][order_R],
        None if masks[1] is None else masks[1][:, order_R],
    )


def paper_average(sources: Sequence[Bottleneck], plans_RR: Sequence[Tensor]) -> Bottleneck:
    """Equations 3 to 5 with plans of equal sizes and uniform marginals, as matrices; biases go with their neurons."""
    size = sources[0].size
    beta = torch.full((size,), 1 / size, dtype=torch.float64)
    downs, biases, ups, up_biases = [], [], [], []
    for source, plan_RR in zip(sources, plans_RR, strict=True):
        move = torch.diag(1 / beta) @ plan_RR.t()
        assert source.down_bias_R is not None and source.up_bias_D is not None
        downs.append(move @ source.down_RD.double())
        biases.append(move @ source.down_bias_R.double())
        ups.append(source.up_DR.double() @ plan_RR @ torch.diag(1 / beta))
        up_biases.append(source.up_bias_D.double())
    down, bias, up, up_bias = (torch.stack(parts).mean(0) for parts in (downs, biases, ups, up_biases))
    return Bottleneck(down, bias, up, up_bias)


def loop_ties(values: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES one entry at a time."""
    lists = [value.flatten().tolist() for value in values]
    kept = []
    for entries in lists:
        count = max(1, round(density * len(entries)))
        best = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))[:count]
        kept.append([entry if i in best else 0.0 for i, entry in enumerate(entries)])
    result = []
    for i in range(len(lists[0])):
        signed = [weight * entries[i] for weight, entries in zip(weights, kept, strict=True)]
        positive = sum(signed) > 0
        agreeing = [(s, abs(w)) for s, w in zip(signed, weights, strict=True) if s and (s > 0) == positive]
        result.append(sum(s for s, _ in agreeing) / sum(w for _, w in agreeing) if agreeing and sum(signed) else 0.0)
    return torch.tensor(result, dtype=values[0].dtype).view_as(values[0])


def ridge_fit(z_NR: Tensor, y_ND: Tensor, prior_DR: Tensor, amount: float, mask_DR: Tensor | None) -> Tensor:
    """Least squares with a pull to a prior, centred, by stacking the pull below the tokens; each row on its support."""
    z_NR, y_ND = z_NR - z_NR.mean(0), y_ND - y_ND.mean(0)
    pull = (amount * len(z_NR)) ** 0.5
    rows = []
    for d in range(y_ND.shape[1]):
        support = torch.ones(z_NR.shape[1], dtype=torch.bool) if mask_DR is None else mask_DR[d]
        left = torch.cat([z_NR[:, support], pull * torch.eye(int(support.sum()), dtype=z_NR.dtype)])
        right = torch.cat([y_ND[:, d], pull * prior_DR[d, support]])
        row = torch.zeros(z_NR.shape[1], dtype=z_NR.dtype)
        row[support] = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
        rows.append(row)
    return torch.stack(rows)


def regression_mean(
    ups: Sequence[Tensor], activations: Sequence[Tensor], weights: Sequence[float], shrink: float
) -> Tensor:
    """RegMean (Jin et al., 2023), one token and one entry at a time."""
    size = ups[0].shape[1]
    left, right = torch.zeros_like(ups[0]), torch.zeros(size, size, dtype=ups[0].dtype)
    for up_DT, activation_NT, weight in zip(ups, activations, weights, strict=True):
        gram = torch.zeros(size, size, dtype=up_DT.dtype)
        for token_T in activation_NT:
            gram += torch.outer(token_T, token_T) / len(activation_NT)
        for row in range(size):
            for column in range(size):
                gram[row, column] *= 1.0 if row == column else shrink
        left += weight * up_DT @ gram
        right += weight * gram
    return left @ torch.linalg.inv(right)


def dense_update(updates: Sequence[LowRank], factors: Sequence[float]) -> Tensor:
    """Weighted sum of s B A, one rank at a time."""
    total = torch.zeros(updates[0].b_OR.shape[0], updates[0].a_RD.shape[1], dtype=torch.float64)
    for update, factor in zip(updates, factors, strict=True):
        for r in range(update.rank):
            total += factor * update.scaling * torch.outer(update.b_OR[:, r].double(), update.a_RD[r].double())
    return total
