"""How adapters are merged, as settings: the four stages of MerA and the presets (He et al., 2023, arXiv:2308.15982).

The stages are canonicalise, align, combine and repair; the scale of the merged output is a setting beside them. The
presets ``sum`` (equation 1), ``avg`` (equation 2), ``wts`` and ``acts`` (equations 3 to 5, with the average of the
*aligned* matrices, which equation 5 misprints) are the paper's, aligned to the first adapter, which the paper leaves
open. ``acts+`` and ``select`` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from peft_lightning.checks import check_choices, check_types
from peft_lightning.errors import UsageError
from peft_lightning.functional.transport import METRICS, SOLVERS

__all__ = ["COMBINATIONS", "PRESETS", "Recipe"]

COMBINATIONS = ("sum", "average", "ties", "regmean", "select")
"""Ways to make one adapter of several that are aligned."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a merge.

    Attributes:
        balance: give each neuron equal norms on both its sides, where the nonlinearity lets scales pass (ReLU).
        align: none, weights or activations (their second moments before the nonlinearity).
        features: what of the weights is compared: down (the rows of the down projection, as in the paper; rows that
            masks have emptied are all alike) or all (with bias and up projection).
        metric: euclidean, squared or inner.
        solver: assignment (one to one; the result has the width of the widest), emd or sinkhorn (mixes; the result
            has the width of the reference).
        regularisation: Sinkhorn's, relative to the spread of the costs.
        marginals: of emd and sinkhorn: uniform, or importance (norms of what is compared).
        reference: what the others are aligned to: first, medoid (least total cost), or the number of an adapter,
            counted from 0.
        combine: sum (equation 1: both matrices; at another scale than sum it is the average), average (down projections
            averaged by the weights' sizes, up projections added with their signs: task arithmetic), ties, regmean, or
            select (some of all neurons as they are).
        density: share of entries that TIES keeps of each adapter.
        shrink: RegMean's factor of products of different neurons.
        choice: what ``select`` keeps: energy (the neurons of largest output energy) or gain (one by one those that
            explain most of what is left of the output).
        width: neurons that ``select`` keeps; None: as many as the widest adapter has.
        repair: none, or refit (the up projection, by least squares, to the weighted outputs of the adapters).
        ridge: of least squares, relative to the mean energy of a neuron; it pulls towards what there was before.
        scale: what the output stands for: mean or sum of the adapters' outputs, or a factor of the mean.
        masks: of sparse adapters: union, or budget (pruned again, by magnitude).
        budget: entries of both matrices that stay at a site; None: as many as the adapters keep on average.

    Raises:
        UsageError: if a value is not allowed.
    """

    balance: bool = False
    align: str = "none"
    features: str = "down"
    metric: str = "euclidean"
    solver: str = "assignment"
    regularisation: float = 0.01
    marginals: str = "uniform"
    reference: str | int = "first"
    combine: str = "average"
    density: float = 0.2
    shrink: float = 0.9
    choice: str = "energy"
    width: int | None = None
    repair: str = "none"
    ridge: float = 1e-3
    scale: str | float = "mean"
    masks: str = "union"
    budget: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "merge")
        check_choices(
            self,
            "merge",
            align=("none", "weights", "activations"),
            features=("down", "all"),
            metric=METRICS,
            solver=SOLVERS,
            marginals=("uniform", "importance"),
            combine=COMBINATIONS,
            choice=("energy", "gain"),
            repair=("none", "refit"),
            masks=("union", "budget"),
        )
        self._check_numbers()
        self._check_pairs()

    @property
    def needs(self) -> tuple[str, ...]:
        """Which moments the recipe needs: of pre-activations, of activations, and again with the merged adapter's."""
        pre = self.align == "activations"
        post = self.combine in ("regmean", "select")
        refit = self.repair == "refit" and self.combine != "select"
        return tuple(name for name, needed in (("pre", pre), ("post", post), ("refit", refit)) if needed)

    def check_used(self, given: Mapping[str, object]) -> None:
        """Refuse settings that decide nothing beside the others.

        Args:
            given: by the user; those that are as they would be anyway are passed over.

        Raises:
            UsageError: names the setting, and the one that it would need.
        """
        aligned, plain = ("align", ("weights", "activations")), {field.name: field.default for field in fields(self)}
        needs = {
            "features": ("align", ("weights",)),
            **dict.fromkeys(("metric", "solver", "marginals", "reference"), aligned),
            "regularisation": ("solver", ("sinkhorn",)),
            "density": ("combine", ("ties",)),
            "shrink": ("combine", ("regmean",)),
            "choice": ("combine", ("select",)),
            "ridge": ("repair", ("refit",)),
        }
        for name, (other, allowed) in needs.items():
            if given.get(name, plain[name]) != plain[name] and getattr(self, other) not in allowed:
                raise UsageError(
                    f"merge.{name} = {given[name]!r}: decides nothing where merge.{other} is {getattr(self, other)!r}; "
                    f"it is for {' or '.join(allowed)}"
                )

    def _check_numbers(self) -> None:
        if isinstance(self.reference, str) and self.reference not in ("first", "medoid"):
            raise UsageError(f"merge.reference = {self.reference!r}: must be first, medoid or the number of an adapter")
        if isinstance(self.scale, str) and self.scale not in ("mean", "sum"):
            raise UsageError(f"merge.scale = {self.scale!r}: must be mean, sum or a number")
        for name in ("regularisation", "ridge"):
            if not getattr(self, name) > 0:
                raise UsageError(f"merge.{name} = {getattr(self, name)}: must be above 0")
        if not 0 < self.density <= 1:
            raise UsageError(f"merge.density = {self.density}: must be above 0 and at most 1")
        if not 0 <= self.shrink <= 1:
            raise UsageError(f"merge.shrink = {self.shrink}: must be from 0 to 1")
        for name in ("width", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"merge.{name} = {value}: must be at least 1")

    def _check_pairs(self) -> None:
        if self.marginals == "importance" and self.solver == "assignment":
            raise UsageError("merge.marginals = 'importance': merge.solver must be emd or sinkhorn, not 'assignment'")
        if self.combine == "select" and self.align != "none":
            raise UsageError(f"merge.combine = 'select' takes neurons as they are: align = {self.align!r} must be none")
        if self.width is not None and self.combine != "select":
            raise UsageError(f"merge.width = {self.width}: merge.combine must be select, not {self.combine!r}")
        if self.budget is not None and self.masks != "budget":
            raise UsageError(f"merge.budget = {self.budget}: merge.masks must be budget, not {self.masks!r}")


PRESETS: dict[str, Recipe] = {
    "sum": Recipe(combine="sum", scale="sum"),
    "avg": Recipe(),
    "wts": Recipe(align="weights"),
    "acts": Recipe(align="activations"),
    "acts+": Recipe(balance=True, align="activations", reference="medoid", repair="refit"),
    "select": Recipe(balance=True, combine="select", repair="refit", scale="sum"),
}
"""The paper's four, and two that use the unlabelled activations for more than the alignment."""
