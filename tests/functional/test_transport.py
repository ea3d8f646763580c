"""Costs without a third dimension equal those with one; plans are the cheapest, and Sinkhorn tends to them."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import peft_lightning.functional.transport as transport
from peft_lightning.errors import UsageError
from peft_lightning.functional.transport import METRICS, Plan, ground_cost, solve_plan
from tests.reference.transport import broadcast_cost, cheapest_assignment


def _features(seed: int, *sizes: int, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) for size in sizes]


def _cost(seed: int, sources: int, slots: int) -> Tensor:
    one_SF, other_TF = _features(seed, sources, slots)
    return broadcast_cost(one_SF, other_TF, "euclidean")


def _total(cost_ST: Tensor, plan: Plan) -> float:
    return float((plan.mass(cost_ST.shape[1]) * cost_ST).sum())


# -- costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_costs_equal_those_of_all_differences(metric: str, dtype: torch.dtype) -> None:
    one_SF, other_TF = (features.to(dtype) for features in _features(0, 5, 7))
    got = ground_cost(one_SF @ other_TF.t(), one_SF.square().sum(1), other_TF.square().sum(1), metric)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(got, broadcast_cost(one_SF, other_TF, metric), atol=close, rtol=close)


def test_rounding_makes_no_cost_negative_or_nan() -> None:
    features = torch.full((3, 50), 1e3) + torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 1e-3
    energy = features.square().sum(1)
    cost = ground_cost(features @ features.t(), energy, energy)
    assert torch.isfinite(cost).all() and (cost >= 0).all()


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match=r"merge\.metric = 'cosine': must be one of euclidean, squared, inner"):
        ground_cost(torch.ones(1, 1), torch.ones(1), torch.ones(1), "cosine")


# -- assignment --------------------------------------------------------------------------------------------------


@given(sources=st.integers(1, 5), more=st.integers(0, 2), seed=st.integers(0, 999), spread=st.floats(0, 9))
def test_an_assignment_is_the_cheapest_of_all(sources: int, more: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # costs that depend on the slot as a whole: which slots stay empty matters
    cost_ST = _cost(seed, sources, sources + more) + spread * torch.rand(sources + more, generator=generator)
    plan = solve_plan(cost_ST)
    assert plan.slots_S is not None and plan.mass_ST is None
    assert len(set(plan.slots_S.tolist())) == sources
    total = float(cost_ST[torch.arange(sources), plan.slots_S].sum())
    assert total == pytest.approx(cheapest_assignment(cost_ST), abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 17, 48])
@pytest.mark.parametrize("seed", [0, 1])
def test_its_cost_is_that_of_exact_optimal_transport(size: int, seed: int) -> None:
    cost = _cost(seed, size, size)
    uniform = np.full(size, 1 / size)
    assert _total(cost, solve_plan(cost)) == pytest.approx(float(ot.emd2(uniform, uniform, cost.numpy())), abs=1e-10)


def test_too_few_slots() -> None:
    with pytest.raises(UsageError, match="assignment of 3 neurons needs as many slots, not 2"):
        solve_plan(torch.zeros(3, 2))


# -- optimal transport -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sources", "slots"), [(6, 6), (8, 5), (4, 7)])
def test_emd_keeps_the_marginals_and_is_pots_optimum(sources: int, slots: int) -> None:
    cost = _cost(3, sources, slots)
    mass_S, mass_T = torch.rand(sources) + 0.1, torch.rand(slots) + 0.1
    plan = solve_plan(cost, "emd", mass_S=mass_S, mass_T=mass_T)
    alpha, beta = mass_S.double() / mass_S.double().sum(), mass_T.double() / mass_T.double().sum()
    mass = plan.mass(slots)
    assert_close(mass.sum(1), alpha, atol=1e-7, rtol=0)
    assert_close(mass.sum(0), beta, atol=1e-7, rtol=0)
    assert _total(cost, plan) == pytest.approx(float(ot.emd2(alpha.numpy(), beta.numpy(), cost.numpy())), rel=1e-5)
    assert plan.residual < 1e-6


def test_emd_of_equal_sizes_is_the_assignment() -> None:
    cost = _cost(4, 12, 12)
    assert_close(solve_plan(cost, "emd").mass(12), solve_plan(cost).mass(12), atol=1e-9, rtol=0)


def test_sinkhorn_tends_to_the_assignment() -> None:
    cost = _cost(5, 10, 10)
    wanted = solve_plan(cost).mass(10)
    distances = [
        float((solve_plan(cost, "sinkhorn", regularisation=r).mass(10) - wanted).abs().sum())
        for r in (0.3, 0.1, 0.03, 0.01, 0.003)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5 and distances[-1] < 0.01


@pytest.mark.parametrize("regularisation", [1e-4, 1e-5])
def test_a_weak_regularisation_is_an_assignment_too(regularisation: float) -> None:
    cost = _cost(7, 48, 48)
    plan = solve_plan(cost, "sinkhorn", regularisation=regularisation)
    assert plan.residual < 0.01
    assert float((plan.mass(48) - solve_plan(cost).mass(48)).abs().sum()) < 0.03


def test_a_sinkhorn_stopped_early_says_so_and_still_mixes_convexly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_STEPS", 1)
    monkeypatch.setattr(transport, "_LAST", 1)
    with pytest.warns(UserWarning, match=r"merge.regularisation = 0.0001: the plan misses its marginals by"):
        plan = solve_plan(_cost(6, 40, 40), "sinkhorn", regularisation=1e-4)
    assert plan.residual > 0.01
    assert_close(plan.incoming(40).sum(1), torch.ones(40, dtype=torch.float64))
    assert_close(plan.outgoing(40).sum(1), torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
def test_equal_costs_are_no_special_case(solver: str) -> None:
    mass = solve_plan(torch.full((3, 3), 2.0), solver).mass(3)
    assert_close(mass.sum(1), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", ["emd", "sinkhorn"])
def test_a_neuron_without_importance_still_goes_somewhere(solver: str) -> None:
    plan = solve_plan(_cost(7, 3, 3), solver, mass_S=torch.tensor([0.0, 1.0, 1.0]), mass_T=torch.zeros(3))
    assert torch.isfinite(plan.outgoing(3)).all()
    assert_close(plan.outgoing(3).sum(1), torch.ones(3, dtype=torch.float64))


# -- maps --------------------------------------------------------------------------------------------------------


def test_maps_of_an_assignment_are_permutations_with_empty_slots() -> None:
    plan = Plan(slots_S=torch.tensor([2, 0]))
    assert plan.incoming(4).tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]
    assert plan.outgoing(4).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert float(plan.mass(4).sum()) == 1


def test_incoming_rows_are_convex_and_outgoing_mass_is_split() -> None:
    plan = solve_plan(_cost(8, 8, 5), "emd")
    assert_close(plan.incoming(5), plan.mass(5).t() * 5, atol=1e-7, rtol=0)
    assert_close(plan.outgoing(5), plan.mass(5) * 8, atol=1e-7, rtol=0)


# -- wrong input -------------------------------------------------------------------------------------------------


def test_wrong_settings() -> None:
    with pytest.raises(UsageError, match=r"merge\.solver = 'lap': must be one of assignment, emd, sinkhorn"):
        solve_plan(torch.zeros(1, 1), "lap")
    with pytest.raises(UsageError, match=r"merge\.regularisation = 0: must be above 0"):
        solve_plan(torch.zeros(1, 1), "sinkhorn", regularisation=0)
    with pytest.raises(UsageError, match="cost is not finite"):
        solve_plan(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize("mass", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_wrong_masses(mass: list[float]) -> None:
    with pytest.raises(UsageError, match="masses of 2 neurons must be 2 finite numbers"):
        solve_plan(torch.zeros(2, 2), "emd", mass_S=torch.tensor(mass))
