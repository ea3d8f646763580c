"""Which neuron of each adapter belongs to which slot of the merged one (MerA, "Wts." and "Acts.").

Symbols: the *template* is what the others are compared with: the reference's neurons. Under an assignment, where the
reference is narrower than the widest adapter, the template grows by the neurons of wider ones that found no partner, so
that all have a place and no function changes.

Deviations: the reference is a setting (the paper's tau_i is open). The medoid, the adapter with the least total cost of
matching all others, makes the result independent of the order; equal totals are told apart by the features' energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.functional.recipes import Recipe
from peft_lightning.functional.transport import Plan, ground_cost, solve_plan

__all__ = ["Alignment", "Products", "align"]


@dataclass(frozen=True)
class Alignment:
    """Where all neurons go.

    Attributes:
        slots: neurons of the merged adapter.
        reference: number of the adapter that the others are aligned to.
        plans: for each adapter.
        costs: mean cost of the matched pairs, for each adapter; 0 for the reference, NaN where nothing is aligned.
        cosines: mean cosine of the matched pairs' features, for each adapter.
    """

    slots: int
    reference: int
    plans: tuple[Plan, ...]
    costs: tuple[float, ...]
    cosines: tuple[float, ...]


class Products:
    """Inner products between the features of neurons.

    A *template* is a tensor with an entry for each slot; it can be indexed and concatenated.

    Args:
        sizes: neurons of each adapter.
        parts: for each adapter ``[R, F]`` features; or None, and then
        gram_MM: the products of all neurons.
    """

    def __init__(self, sizes: Sequence[int], parts: Sequence[Tensor] | None, gram_MM: Tensor | None = None) -> None:
        self.sizes = tuple(sizes)
        self._gram_MM = gram_MM
        self._neurons = parts if gram_MM is None else torch.arange(len(gram_MM)).split(self.sizes)
        self._energies: dict[int, Tensor] = {}

    @classmethod
    def of(
        cls, sources: Sequence[Bottleneck], recipe: Recipe, pre: Moments | None, factors: Sequence[Tensor]
    ) -> Products:
        """What a recipe compares.

        Args:
            sources: canonical adapters.
            recipe: says whether weights or activations.
            pre: moments of the original adapters' pre-activations, where these are compared.
            factors: for each adapter ``[R]`` by what canonicalising has multiplied them.

        Raises:
            UsageError: if the moments are missing or belong to other adapters.
        """
        sizes = [source.size for source in sources]
        if recipe.align == "weights":
            parts = [source.down_RD for source in sources]
            if recipe.features == "all":
                parts = [torch.cat([s.down_RD, _column(s), s.up_DR.t()], 1) for s in sources]
            return cls(sizes, [part.cpu() for part in parts])
        if pre is None or pre.sizes != tuple(sizes):
            given = "none are given" if pre is None else f"those given are of {pre.sizes} neurons"
            raise UsageError(f"merge.align = 'activations' needs moments of {tuple(sizes)} neurons; {given}")
        factor_M = torch.cat(list(factors)).cpu().double()
        return cls(sizes, None, pre.second() * factor_M[:, None] * factor_M)

    def neurons(self, number: int) -> Tensor:
        """The template that one adapter's neurons are."""
        assert self._neurons is not None
        return self._neurons[number]

    def between(self, number: int, template: Tensor) -> Tensor:
        """``[S, T]`` products of an adapter's neurons with a template's."""
        neurons = self.neurons(number)
        return neurons @ template.t() if self._gram_MM is None else self._gram_MM[neurons][:, template]

    def energy(self, number: int) -> Tensor:
        """fp64 ``[R]`` products of an adapter's neurons with themselves."""
        if number not in self._energies:
            neurons = self.neurons(number)
            own = torch.linalg.vector_norm(neurons, dim=1) if self._gram_MM is None else self._gram_MM.diagonal()
            self._energies[number] = own.double().square() if self._gram_MM is None else own[neurons]
        return self._energies[number]


def align(sizes: Sequence[int], recipe: Recipe, products: Products | None) -> Alignment:
    """Match the neurons of all adapters.

    Args:
        sizes: neurons of each adapter.
        recipe: the stage's settings.
        products: of what is compared; None where ``recipe.align`` is none: each neuron keeps its number.

    Raises:
        UsageError: if the reference is no adapter's number, or a product is not finite.
    """
    reference = 0 if isinstance(recipe.reference, str) else recipe.reference
    if not 0 <= reference < len(sizes):
        raise UsageError(f"merge.reference = {reference}: must be from 0 to {len(sizes) - 1}")
    if products is None:
        kept = tuple(Plan(slots_S=torch.arange(size)) for size in sizes)
        unknown = (float("nan"),) * len(sizes)
        return Alignment(max(sizes), reference, kept, unknown, unknown)
    if recipe.reference == "medoid":
        reference = _medoid(sizes, recipe, products)
    template, energy_T = products.neurons(reference), products.energy(reference)
    plans = {reference: Plan(slots_S=torch.arange(sizes[reference]))}
    costs, cosines = {reference: 0.0}, {reference: 1.0}
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if number == reference:
            continue
        plans[number], costs[number], cosines[number] = _match(number, template, energy_T, recipe, products)
        slots_S = plans[number].slots_S
        if slots_S is not None and sizes[number] > len(template):
            extra_S = slots_S >= len(template)
            template = torch.cat([template, products.neurons(number)[extra_S]])
            energy_T = torch.cat([energy_T, products.energy(number)[extra_S]])
    order = range(len(sizes))
    return Alignment(
        len(template),
        reference,
        tuple(plans[i] for i in order),
        tuple(costs[i] for i in order),
        tuple(cosines[i] for i in order),
    )


def _match(
    number: int, template: Tensor, energy_T: Tensor, recipe: Recipe, products: Products
) -> tuple[Plan, float, float]:
    """Plan, mean cost and mean cosine; neurons without a partner get the slots behind the template, in order."""
    energy_S = products.energy(number)
    cross_ST = products.between(number, template)
    cost_ST = ground_cost(cross_ST, energy_S, energy_T, recipe.metric)
    if recipe.solver == "assignment":
        plan, pairs_S, pairs_T = _assign(cost_ST)
        cost = float(cost_ST[pairs_S, pairs_T].mean())
        norms_P = (energy_S[pairs_S] * energy_T[pairs_T]).sqrt()
        some_P = norms_P > 0  # neurons of zeros, as masks leave them, have no direction
        return plan, cost, float((cross_ST[pairs_S, pairs_T][some_P] / norms_P[some_P]).mean()) if some_P.any() else 0.0
    important = recipe.marginals == "importance"
    plan = solve_plan(
        cost_ST,
        recipe.solver,
        mass_S=energy_S.sqrt() if important else None,
        mass_T=energy_T.sqrt() if important else None,
        regularisation=recipe.regularisation,
    )
    mass_ST = plan.mass(len(template))
    norms_ST = (energy_S[:, None] * energy_T).sqrt().clamp_(min=_TINY)
    return plan, float((mass_ST * cost_ST).sum()), float((mass_ST * cross_ST / norms_ST).sum())


_TINY = 1e-300  # a norm of zero has the cosine 0


def _assign(cost_ST: Tensor) -> tuple[Plan, Tensor, Tensor]:
    """One-to-one plan and its pairs; the side with more neurons has some without a partner."""
    sources, slots = cost_ST.shape
    if sources <= slots:
        plan = solve_plan(cost_ST)
        assert plan.slots_S is not None
        return plan, torch.arange(sources), plan.slots_S
    partners_T = solve_plan(cost_ST.t()).slots_S
    assert partners_T is not None
    slots_S = torch.full((sources,), -1)
    slots_S[partners_T] = torch.arange(slots)
    slots_S[slots_S < 0] = torch.arange(slots, sources)
    return Plan(slots_S=slots_S), partners_T, torch.arange(slots)


def _medoid(sizes: Sequence[int], recipe: Recipe, products: Products) -> int:
    """The adapter (under an assignment: of the widest) with the least total cost."""
    totals = torch.zeros(len(sizes), dtype=torch.float64)
    for one in range(len(sizes)):
        for other in range(one):
            _, cost, _ = _match(one, products.neurons(other), products.energy(other), recipe, products)
            totals[one] += cost
            totals[other] += cost
    widest = max(sizes) if recipe.solver == "assignment" else 0
    candidates = [i for i, size in enumerate(sizes) if size >= widest]
    least = min(float(totals[i]) for i in candidates)
    tied = [i for i in candidates if float(totals[i]) <= least + 1e-9 * abs(least)]
    return max(tied, key=lambda i: float(products.energy(i).sum()))


def _column(source: Bottleneck) -> Tensor:
    bias_R = source.down_bias_R
    return source.down_RD.new_zeros(source.size, 1) if bias_R is None else bias_R[:, None]
