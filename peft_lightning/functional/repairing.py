"""The up projection from unlabelled activations: least squares, and the choice of neurons (ours).

Symbols: ``z`` = activations of the merged adapter, ``a`` = those of the adapters, one below the other,
``Y = sum_j v_j f_j`` = what the output stands for, which is linear in ``a``. With means taken out (where there is a
bias),

    W = P + (Y z' - P z z') (z z' + lambda I)^-1,   b = mean Y - W mean z,

so that what the activations do not decide stays as it was, P, and a merge that is right already does not move.
Everything is in the second moments of ``(z, a)``. Masked entries stay zero: every row is solved on its own support.

Shapes: D model width, R neurons of the merged adapter, M of all adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck

__all__ = ["output_error", "refit", "select"]

_ALIKE = 0.999  # cosine from which two neurons say the same
_ROWS = 64  # rows with masks of their own that are solved together


@torch.no_grad()
def refit(
    merged: Bottleneck,
    sources: Sequence[Bottleneck],
    outputs: Sequence[float],
    moments: Moments,
    ridge: float,
    *,
    chosen_R: Tensor | None = None,
    factors: Sequence[Tensor] = (),
) -> Bottleneck:
    """Fit the up projection to the weighted outputs of the sources.

    Args:
        merged: scaling 1; its up projection is where the fit starts.
        sources: the adapters, with their scaling.
        outputs: v.
        moments: of activations, the merged adapter's first, then those of the sources.
        ridge: lambda, relative to the mean energy of z; above 0.
        chosen_R: int64, where the merged adapter's neurons are neurons of the sources: which; the moments are then of
            the sources only.
        factors: for each source ``[R]``, what its activations in the moments lack; none: nothing.

    Returns:
        The merged adapter with another up projection and, if it has one, up bias.

    Raises:
        UsageError: if the moments belong to other adapters or saw no token.
    """
    sizes = [source.size for source in sources]
    second_MM, mean_M = _moments(moments, sizes if chosen_R is not None else [merged.size, *sizes], factors)
    target_DM, target_D = _targets(sources, outputs)
    inner_R, start = (torch.arange(merged.size), merged.size) if chosen_R is None else (chosen_R, 0)
    means_R, means_M = mean_M[inner_R], mean_M[start:]
    gram_RR, cross_RM = second_MM[inner_R][:, inner_R], second_MM[inner_R, start:]
    if merged.up_bias_D is not None:
        gram_RR, cross_RM = gram_RR - torch.outer(means_R, means_R), cross_RM - torch.outer(means_R, means_M)
    prior_DR = merged.up_DR.cpu().double()
    left_DR = target_DM @ cross_RM.t() - prior_DR @ gram_RR
    amount = ridge * float(gram_RR.diagonal().mean())
    if amount <= 0:  # nothing is ever active: nothing is known
        return merged
    if merged.up_mask_DR is None:
        up_DR = prior_DR + _solve(gram_RR, left_DR, amount)
    else:
        up_DR = prior_DR + _solve_masked(gram_RR, left_DR, amount, merged.up_mask_DR.cpu())
    bias_D = None if merged.up_bias_D is None else target_D + target_DM @ means_M - up_DR @ means_R
    return replace(
        merged,
        up_DR=up_DR.to(merged.up_DR),
        up_bias_D=None if bias_D is None else bias_D.to(merged.up_DR),
    )


@torch.no_grad()
def select(
    sources: Sequence[Bottleneck],
    outputs: Sequence[float],
    moments: Moments,
    width: int,
    *,
    choice: str = "energy",
    factors: Sequence[Tensor] = (),
) -> tuple[Bottleneck, Tensor]:
    """Keep some of all adapters' neurons.

    ``energy`` keeps those of largest output energy, E|v u a|^2. ``gain`` takes one by one the neuron that explains
    most of what those before it leave of Y (orthogonal least squares: Chen et al., 1991), so that no two of them say
    nearly the same. For both, a neuron that is a multiple of one that stays leaves its output to that one.

    Args:
        sources: adapters with scaling 1, on one device.
        outputs: v.
        moments: of the sources' activations.
        width: R, how many stay.
        choice: energy or gain.
        factors: as in :func:`refit`.

    Returns:
        The adapter of these neurons, with masks if a source has any; and int64 ``[R]``, their numbers among all.

    Raises:
        UsageError: if there are fewer neurons, or the moments belong to other adapters or saw no token.
    """
    second_MM, mean_M = _moments(moments, [source.size for source in sources], factors)
    if width > len(mean_M):
        raise UsageError(f"merge.width = {width}: must be at most {len(mean_M)}, the neurons of all adapters")
    target_DM, target_D = _targets(sources, outputs)
    if choice == "gain":
        has_bias = any(source.up_bias_D is not None for source in sources)
        chosen_R = _by_gain(target_DM, second_MM - torch.outer(mean_M, mean_M) * has_bias, width)
    else:
        chosen_R = _by_energy(target_DM, second_MM, width)
    up_DR = _taken_over(target_DM, second_MM, chosen_R)
    like = sources[0].down_RD
    place_R, up_DR = chosen_R.to(like.device), up_DR.to(like)
    biases = [s.down_RD.new_zeros(s.size) if s.down_bias_R is None else s.down_bias_R for s in sources]
    down_mask_RD, up_mask_DR = None, None
    if any(source.down_mask_RD is not None for source in sources):
        rows = [torch.ones_like(s.down_RD) > 0 if s.down_mask_RD is None else s.down_mask_RD for s in sources]
        columns = [torch.ones_like(s.up_DR) > 0 if s.up_mask_DR is None else s.up_mask_DR for s in sources]
        down_mask_RD, up_mask_DR = torch.cat(rows)[place_R], torch.cat(columns, 1)[:, place_R] | (up_DR != 0)
    chosen = Bottleneck(
        torch.cat([source.down_RD for source in sources])[place_R],
        None if all(source.down_bias_R is None for source in sources) else torch.cat(biases)[place_R],
        up_DR,
        None if all(source.up_bias_D is None for source in sources) else target_D.to(like),
        down_mask_RD=down_mask_RD,
        up_mask_DR=up_mask_DR,
    )
    return chosen, chosen_R


@torch.no_grad()
def output_error(
    merged: Bottleneck, sources: Sequence[Bottleneck], outputs: Sequence[float], moments: Moments
) -> float:
    """Distance of the merged adapter's output from what it stands for, relative to the size of that.

    Args:
        merged: scaling 1.
        sources: the adapters, with their scaling.
        outputs: v.
        moments: of activations, the merged adapter's first, then those of the sources.

    Returns:
        sqrt(E|f - Y|^2 / E|Y|^2) over the tokens; infinite where Y is 0 and f is not.

    Raises:
        UsageError: if the moments belong to other adapters or saw no token.
    """
    second_MM, mean_M = _moments(moments, [merged.size, *(source.size for source in sources)])
    target_DM, target_D = _targets(sources, outputs)
    up_DR = merged.up_DR.cpu().double()
    rest_D = -target_D if merged.up_bias_D is None else merged.up_bias_D.cpu().double() - target_D
    wrong_DM = torch.cat([up_DR, -target_DM], 1)
    product_DM = wrong_DM @ second_MM
    error = float((product_DM * wrong_DM).sum() + (2 * (wrong_DM @ mean_M) + rest_D) @ rest_D)
    # what Y itself gives is in that product already
    own_DM = up_DR @ second_MM[: merged.size, merged.size :] - product_DM[:, merged.size :]
    size = float((own_DM * target_DM).sum() + (2 * (target_DM @ mean_M[merged.size :]) + target_D) @ target_D)
    return (max(error, 0.0) / size) ** 0.5 if size > 0 else float("inf") if error > 0 else 0.0


def _moments(moments: Moments, sizes: Sequence[int], factors: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    if moments.sizes != tuple(sizes):
        raise UsageError(f"moments of {moments.sizes} neurons: must be of {tuple(sizes)}")
    second_MM, mean_M = moments.second(), moments.mean()
    if factors:
        factor_M = torch.cat([factor.cpu().double() for factor in factors])
        factor_M = torch.cat([factor_M.new_ones(len(mean_M) - len(factor_M)), factor_M])
        second_MM, mean_M = second_MM * factor_M[:, None] * factor_M, mean_M * factor_M
    if not bool(torch.isfinite(second_MM).all() and torch.isfinite(mean_M).all()):
        raise UsageError("products of activations are not finite: an adapter is too large, or holds inf or NaN")
    return second_MM, mean_M


def _targets(sources: Sequence[Bottleneck], outputs: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Y = U a + b: U fp64 ``[D, M]`` and b ``[D]``, on the CPU."""
    pairs = list(zip(sources, outputs, strict=True))
    target_DM = torch.cat([source.up_DR.cpu().double() * (v * source.scaling) for source, v in pairs], 1)
    target_D = target_DM.new_zeros(len(target_DM))
    for source, v in pairs:
        if source.up_bias_D is not None:
            target_D += source.up_bias_D.cpu().double() * (v * source.scaling)
    return target_DM, target_D


def _solve(gram_RR: Tensor, left_DR: Tensor, amount: float) -> Tensor:
    """left (gram + amount I)^-1; what rounding made negative in the gram counts as zero."""
    values_R, vectors_RR = torch.linalg.eigh(gram_RR)
    return (left_DR @ vectors_RR / (values_R.clamp(min=0) + amount)) @ vectors_RR.t()


def _solve_masked(gram_RR: Tensor, left_DR: Tensor, amount: float, mask_DR: Tensor) -> Tensor:
    """The same for each row on its own support; zero elsewhere."""
    identity_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype)
    solved = []
    for left_KR, mask_KR in zip(left_DR.split(_ROWS), mask_DR.to(gram_RR).split(_ROWS), strict=True):
        supported_KRR = mask_KR[:, :, None] * (gram_RR + amount * identity_RR) * mask_KR[:, None, :]
        factor_KRR = torch.linalg.cholesky(supported_KRR + (1 - mask_KR)[:, :, None] * identity_RR)
        solved.append(torch.cholesky_solve((left_KR * mask_KR)[..., None], factor_KRR)[..., 0])
    return torch.cat(solved)


def _by_gain(target_DM: Tensor, gram_MM: Tensor, width: int) -> Tensor:
    """Numbers of the neurons chosen one after the other; of those that add nothing the first."""
    left_DM, gram_MM = target_DM @ gram_MM, gram_MM.clone()
    left_MM = left_DM.t() @ left_DM  # of what is left of Y z', only products are needed
    least_M = 1e-9 * gram_MM.diagonal()  # less than that is what rounding leaves of a neuron that others replace
    free_M = torch.ones(len(gram_MM), dtype=torch.bool)
    chosen = []
    for _ in range(width):
        energy_M = gram_MM.diagonal()
        useful_M = free_M & (energy_M > least_M)
        gain_M = torch.where(useful_M, (left_MM.diagonal() / energy_M).clamp(min=0), -1.0).where(free_M, -2.0)
        best = int(gain_M.argmax())
        chosen.append(best)
        free_M[best] = False
        if useful_M[best]:
            share_M = gram_MM[best] / energy_M[best]
            half_M = left_MM[best] - 0.5 * left_MM[best, best] * share_M
            gram_MM.addr_(gram_MM[best].clone(), share_M, alpha=-1)
            left_MM.addr_(share_M, half_M, alpha=-1).addr_(half_M, share_M, alpha=-1)
    return torch.tensor(chosen)


def _by_energy(target_DM: Tensor, second_MM: Tensor, width: int) -> Tensor:
    """Numbers of the neurons of most energy; those that are multiples of one another count once, together."""
    energy_M = second_MM.diagonal()
    alike_MM = _alike(second_MM)
    order = (energy_M * target_DM.square().sum(0)).argsort(descending=True, stable=True).tolist()
    free_M = torch.ones(len(order), dtype=torch.bool)
    first, others, strength = [], [], []
    for number in order:
        if not free_M[number]:
            others.append(number)
            continue
        group = (alike_MM[number] & free_M).nonzero().flatten()
        free_M[group] = False
        first.append(number)
        up_D = target_DM[:, number]
        if len(group) > 1:
            up_D = target_DM[:, group] @ second_MM[number, group] / energy_M[number]
        strength.append(float(energy_M[number] * up_D.square().sum()))
    best = torch.tensor(strength).argsort(descending=True, stable=True)[:width].tolist()
    return torch.tensor([first[i] for i in best] + others[: width - len(best)])


def _alike(second_MM: Tensor) -> Tensor:
    """bool ``[M, M]``: which neurons are multiples of one another; each is one of itself."""
    norm_M = second_MM.diagonal().sqrt()
    alike_MM = second_MM > _ALIKE * norm_M[:, None] * norm_M
    return alike_MM.fill_diagonal_(True)


def _taken_over(target_DM: Tensor, second_MM: Tensor, chosen_R: Tensor) -> Tensor:
    """Output weights of the chosen neurons, with those of their multiples that go."""
    up_DR = target_DM[:, chosen_R]
    alike_RM = _alike(second_MM)[chosen_R]
    alike_RM[:, chosen_R] = False
    for number in alike_RM.any(0).nonzero().flatten().tolist():
        heir = int(alike_RM[:, number].int().argmax())
        kept = chosen_R[heir]
        up_DR[:, heir] += target_DM[:, number] * (second_MM[kept, number] / second_MM[kept, kept])
    return up_DR
