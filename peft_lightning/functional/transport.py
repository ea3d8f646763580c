"""Ground costs and transport plans between the neurons of two bottlenecks (MerA, equations 3 and 4).

Symbols: ``C`` = cost, ``T`` = plan with the row sums ``alpha`` and the column sums ``beta``. Both ends of an adapter
lie on the frozen residual stream, so the plans before and after it are the identity and one plan a site remains:

    W_down <- diag(1/beta) T' W_down        W_up <- W_up diag(1/alpha) T

Deviations. The paper normalises by 1/beta only; where the numbers of neurons differ, W_up has to be split by 1/alpha
instead, or the output changes its size (for equal sizes and uniform marginals the two are the same). For one-to-one
matching the plan is an assignment, which scipy finds faster than a solver of optimal transport: the smaller side's
neurons each get a slot of their own among the larger side's, and no function changes. alpha and beta are the sums that
the plan has, not those that were asked for: a Sinkhorn stopped early still gives convex combinations.

Costs come from inner products, ``|a - b|^2 = aa + bb - 2 ab``: those of weights, or second moments of
activations. Means are not taken out: what is compared is how much two neurons' activations differ token by token.

Shapes: S neurons of a source, T slots (neurons of the reference).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from peft_lightning.errors import UsageError

__all__ = ["METRICS", "SOLVERS", "Plan", "ground_cost", "solve_plan"]

METRICS = ("euclidean", "squared", "inner")
"""Distance, its square, or minus the inner product (Ainsworth et al., 2023)."""

SOLVERS = ("assignment", "emd", "sinkhorn")
"""One to one (scipy); exact and entropic optimal transport (POT)."""

_LEAST_MASS = 1e-6  # of the largest: a neuron of no importance still goes somewhere
_STEPS, _LAST = 200, 5000  # of Sinkhorn at each strength, and at the one that is asked for
_MISSED = 0.01


@dataclass(frozen=True)
class Plan:
    """Where the neurons of a source go.

    Attributes:
        slots_S: int64, the slot of each neuron, no two alike; None where neurons are mixed.
        mass_ST: fp64 ``[S, T]`` transported mass; None where ``slots_S`` says all.
        residual: by how much the sums miss the marginals that were asked for (L1), of a total mass of 1.
    """

    slots_S: Tensor | None = None
    mass_ST: Tensor | None = None
    residual: float = 0.0

    def incoming(self, slots: int) -> Tensor:
        """diag(1/beta) T', fp64 ``[T, S]``: what each of ``slots`` slots is made of; zero rows where it is empty."""
        mass_TS = self.mass(slots).t()
        return mass_TS / mass_TS.sum(1, keepdim=True).where(mass_TS.sum(1, keepdim=True) > 0, 1.0)

    def outgoing(self, slots: int) -> Tensor:
        """diag(1/alpha) T, fp64 ``[S, T]``: how each neuron's output is shared out over ``slots`` slots."""
        mass_ST = self.mass(slots)
        return mass_ST / mass_ST.sum(1, keepdim=True)

    def mass(self, slots: int) -> Tensor:
        """T, fp64 ``[S, T]``, over ``slots`` slots; its sum is 1."""
        if self.slots_S is None:
            assert self.mass_ST is not None
            return torch.nn.functional.pad(self.mass_ST, (0, slots - self.mass_ST.shape[1]))
        count = len(self.slots_S)
        mass_ST = torch.zeros(count, slots, dtype=torch.float64)
        mass_ST[torch.arange(count), self.slots_S] = 1 / count
        return mass_ST


def ground_cost(cross_ST: Tensor, energy_S: Tensor, energy_T: Tensor, metric: str = "euclidean") -> Tensor:
    """Cost of putting each neuron of a source into each slot.

    Args:
        cross_ST: ``[S, T]`` inner products of the neurons' features.
        energy_S: ``[S]`` squared norms of the source's features.
        energy_T: ``[T]`` squared norms of the slots' features.
        metric: one of :data:`METRICS`.

    Returns:
        fp64 ``[S, T]``; the same up to rounding as from all differences, without a third dimension.

    Raises:
        UsageError: if the metric is unknown.

    >>> ground_cost(torch.tensor([[0.0]]), torch.tensor([9.0]), torch.tensor([16.0])).tolist()
    [[5.0]]
    """
    if metric not in METRICS:
        raise UsageError(f"merge.metric = {metric!r}: must be one of {', '.join(METRICS)}")
    if metric == "inner":
        return -cross_ST.double()
    squared_ST = (energy_S.double()[:, None] + energy_T.double()).sub_(cross_ST, alpha=2).clamp_(min=0)
    return squared_ST if metric == "squared" else squared_ST.sqrt_()


def solve_plan(
    cost_ST: Tensor,
    solver: str = "assignment",
    *,
    mass_S: Tensor | None = None,
    mass_T: Tensor | None = None,
    regularisation: float = 0.01,
) -> Plan:
    """The cheapest plan.

    Args:
        cost_ST: ``[S, T]`` costs, finite.
        solver: one of :data:`SOLVERS`. ``assignment`` wants S <= T, and ignores masses.
        mass_S: ``[S]`` importance of the source's neurons, at least 0, of any sum; None: all alike.
        mass_T: ``[T]`` the same of the slots.
        regularisation: of Sinkhorn, relative to the spread of the costs. A warning says where it is too weak for the
            plan to have the sums that were asked for.

    Returns:
        A plan on the CPU.

    Raises:
        UsageError: if the solver is unknown, a cost or a mass is not finite, or an assignment has too few slots.
    """
    if solver not in SOLVERS:
        raise UsageError(f"merge.solver = {solver!r}: must be one of {', '.join(SOLVERS)}")
    cost = cost_ST.detach().cpu().double().numpy()
    if not np.isfinite(cost).all():
        raise UsageError("a matching cost is not finite: the adapters or their activations hold inf or NaN")
    sources, slots = cost.shape
    if solver == "assignment":
        if sources > slots:
            raise UsageError(f"an assignment of {sources} neurons needs as many slots, not {slots}")
        if sources == slots:  # changes no order of plans, and gives scipy's search a start
            cost = cost - cost.min(0)
        cost = cost - cost.min(1, keepdims=True)
        return Plan(slots_S=torch.from_numpy(_assignment_solver()(cost)[1]))
    import ot  # takes over a second, and an assignment does without

    alpha, beta = _marginal(mass_S, sources), _marginal(mass_T, slots)
    if solver == "emd":
        mass = ot.emd(alpha, beta, cost, numItermax=max(100_000, 100 * sources * slots))
    else:
        if not regularisation > 0:
            raise UsageError(f"merge.regularisation = {regularisation}: must be above 0")
        mass = _sinkhorn(alpha, beta, (cost - cost.min()) / (float(np.ptp(cost)) or 1.0), regularisation)
    residual = float(np.abs(mass.sum(1) - alpha).sum() + np.abs(mass.sum(0) - beta).sum())
    if residual > _MISSED:
        warnings.warn(
            f"merge.regularisation = {regularisation}: the plan misses its marginals by {residual:.3f} of 1; raise it, "
            "or use the solver assignment or emd",
            stacklevel=2,
        )
    return Plan(mass_ST=torch.from_numpy(mass), residual=residual)


def _sinkhorn(alpha: np.ndarray, beta: np.ndarray, cost: np.ndarray, regularisation: float) -> np.ndarray:
    """Start from a strong regularisation and halve it (Schmitzer, 2019): from nothing, a weak one takes for ever."""
    import ot

    strength, potentials = max(1.0, regularisation), None
    while True:
        last = strength <= regularisation
        mass, log = ot.bregman.sinkhorn_log(
            alpha, beta, cost, strength, numItermax=_LAST if last else _STEPS, stopThr=1e-4, warn=False, log=True,
            warmstart=potentials,
        )  # fmt: skip
        if last:
            return np.asarray(mass)
        weaker = max(strength / 2, regularisation)
        potentials = log["log_u"] * strength / weaker, log["log_v"] * strength / weaker
        strength = weaker


@cache
def _assignment_solver() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from scipy.optimize import linear_sum_assignment  # slow to import

    solver: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = linear_sum_assignment
    return solver


def _marginal(mass: Tensor | None, count: int) -> np.ndarray:
    """Masses with the sum 1, none of them zero."""
    values = np.ones(count) if mass is None else mass.detach().cpu().double().numpy()
    if len(values) != count or not np.isfinite(values).all() or (values < 0).any():
        raise UsageError(f"the masses of {count} neurons must be {count} finite numbers, at least 0")
    values = np.maximum(values, _LEAST_MASS * (values.max() or 1 / _LEAST_MASS))
    return np.asarray(values / values.sum())
