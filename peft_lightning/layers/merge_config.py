"""Settings of a merge as a user gives them: a preset, what differs from it, and what it is calibrated on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft_lightning.checks import check_choices, check_types
from peft_lightning.errors import UsageError
from peft_lightning.functional.lowrank import UPDATE_METHODS
from peft_lightning.functional.recipes import PRESETS, Recipe

__all__ = ["STREAMS", "MergeConfig"]

STREAMS = ("own", "shared")
"""Each adapter on a forward pass of its own, or all of them on the bare backbone's states."""

_UPDATE_SETTINGS: dict[str, Any] = {"rank": None, "density": 0.2, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How adapters are merged.

    Attributes:
        preset: sum, avg, wts, acts, acts+ or select for bottleneck adapters; cat, svd, ties or dare for LoRA.
        weights: one number for each adapter, of either sign; None: all alike.
        scale: what the merged output stands for: mean or sum of the adapters' outputs, or a factor of the mean. None:
            the preset's own; of LoRA the sum where weights are given, as in PEFT, else the mean.
        tokens: calibration tokens that are read at least, counted over all ranks; whole batches are read.
        streams: own (each adapter on its own forward pass) or shared (all read the bare backbone's states, which
            costs one pass whatever their number, and is not what they see in use).
        recipe: single stages other than the preset's, fields of ``functional.recipes.Recipe``, whose ``reference``
            may also be an adapter's name: a whole number counts the adapters from 0, a text is a name (but for first
            and medoid), and a number that is another adapter's name is refused. For LoRA: rank (None: the
            largest of the adapters'; cat has their sum), density, seed.

    Raises:
        UsageError: if a value is not allowed.
    """

    preset: str = "select"
    weights: list[float] | None = None
    scale: str | float | None = None
    tokens: int = 2048
    streams: str = "own"
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "merge")
        check_choices(self, "merge", preset=(*PRESETS, *UPDATE_METHODS), streams=STREAMS)
        for weight in self.weights or ():
            if type(weight) not in (int, float) or not math.isfinite(weight):
                raise UsageError(f"merge.weights = {self.weights}: must be finite numbers")
        if isinstance(self.scale, str) and self.scale not in ("mean", "sum"):
            raise UsageError(f"merge.scale = {self.scale!r}: must be mean, sum or a number")
        if self.tokens < 1:
            raise UsageError(f"merge.tokens = {self.tokens}: must be at least 1")
        if "scale" in self.recipe:
            raise UsageError(f"merge.recipe.scale = {self.recipe['scale']!r}: is merge.scale; give it there")
        known = _UPDATE_SETTINGS if self.for_updates else [f.name for f in fields(Recipe) if f.name != "scale"]
        if odd := [str(name) for name in self.recipe if name not in known]:
            raise UsageError(f"merge.recipe.{odd[0]}: preset {self.preset} has {', '.join(known)}")
        if self.for_updates:
            self._check_updates()
        elif not isinstance(self.recipe.get("reference"), str):
            self.resolve()

    @property
    def for_updates(self) -> bool:
        """Whether the preset is one for LoRA."""
        return self.preset in UPDATE_METHODS

    def resolve(self, names: Sequence[str] = ()) -> Recipe:
        """The whole recipe for bottleneck adapters.

        Args:
            names: of the adapters, one of which may be the reference.

        Raises:
            UsageError: if the preset is one for LoRA, a stage has a value that is not allowed or that decides nothing,
                or the reference is none of the adapters or could be two of them.
        """
        if self.for_updates:
            raise UsageError(
                f"merge.preset = {self.preset!r}: is for LoRA; bottleneck adapters have {', '.join(PRESETS)}"
            )
        changed = dict(self.recipe)
        if names and "reference" in changed:
            changed["reference"] = _place(changed["reference"], list(names))
        if self.scale is not None:
            changed["scale"] = self.scale
        recipe = replace(PRESETS[self.preset], **changed)
        recipe.check_used(self.recipe)
        return recipe

    def update_options(self) -> dict[str, Any]:
        """Arguments of ``functional.lowrank.merge_updates``, all but the updates.

        Raises:
            UsageError: if the preset is not one for LoRA.
        """
        if not self.for_updates:
            raise UsageError(f"merge.preset = {self.preset!r}: LoRA adapters have {', '.join(UPDATE_METHODS)}")
        own = "mean" if self.weights is None else "sum"
        scale = own if self.scale is None else self.scale
        return {"method": self.preset, "weights": self.weights, "scale": scale, **_UPDATE_SETTINGS, **self.recipe}

    def _check_updates(self) -> None:
        options = {**_UPDATE_SETTINGS, **self.recipe}
        rank, density, seed = options["rank"], options["density"], options["seed"]
        if rank is not None and (type(rank) is not int or rank < 1 or self.preset == "cat"):
            raise UsageError(f"merge.recipe.rank = {rank!r}: must be a whole number of at least 1, and cat takes none")
        if type(density) not in (int, float) or not 0 < density <= 1:
            raise UsageError(f"merge.recipe.density = {density!r}: must be above 0 and at most 1")
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise UsageError(f"merge.recipe.seed = {seed!r}: must be a whole number of at least 0 and below 2**31")


def _place(reference: Any, names: list[str]) -> str | int:
    """The number of the adapter that is meant; first and medoid stay."""
    if reference in ("first", "medoid"):
        return str(reference)
    if isinstance(reference, str) and reference in names:
        return names.index(reference)
    if type(reference) is not int or not 0 <= reference < len(names):
        raise UsageError(
            f"merge.recipe.reference = {reference!r}: must be first, medoid, a number from 0 to {len(names) - 1} or "
            f"one of {', '.join(names)}"
        )
    if str(reference) in names and names[reference] != str(reference):
        raise UsageError(
            f"merge.recipe.reference = {reference}: counted from 0 that is {names[reference]!r}, and another adapter "
            f"is called {str(reference)!r}; give a name, as text, of {', '.join(names)}"
        )
    return reference
