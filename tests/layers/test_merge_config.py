"""Settings of a merge: presets, what may differ from them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from peft_lightning.errors import UsageError
from peft_lightning.functional.recipes import PRESETS
from peft_lightning.layers.merge_config import MergeConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_functional_ones_unless_told_otherwise(preset: str) -> None:
    assert MergeConfig(preset=preset).resolve() == PRESETS[preset]
    changed = MergeConfig(preset=preset, scale=0.5, recipe={"masks": "budget"}).resolve()
    assert (changed.scale, changed.masks) == (0.5, "budget")


@pytest.mark.parametrize(
    ("preset", "recipe", "message"),
    [
        ("wts", {"ridge": 5.0}, "merge.ridge = 5.0: decides nothing where merge.repair is 'none'; it is for refit"),
        ("wts", {"density": 0.3}, "merge.density = 0.3: .* merge.combine is 'average'; it is for ties"),
        ("wts", {"shrink": 0.5}, "merge.shrink = 0.5: .*; it is for regmean"),
        (
            "sum",
            {"solver": "sinkhorn"},
            "merge.solver = 'sinkhorn': .* merge.align is 'none'; it is for weights or act",
        ),
        ("select", {"reference": 1}, "merge.reference = 1: .* merge.align is 'none'"),
        ("acts", {"features": "all"}, "merge.features = 'all': .* merge.align is 'activations'; it is for weights"),
        ("acts", {"regularisation": 0.1}, "merge.regularisation = 0.1: .* merge.solver is 'assignment'"),
        ("acts", {"choice": "gain"}, "merge.choice = 'gain': .* it is for select"),
    ],
)
def test_what_decides_nothing_is_refused(preset: str, recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MergeConfig(preset=preset, recipe=recipe).resolve()
    default = {name: getattr(PRESETS[preset], name) for name in recipe if name not in ("reference",)}
    assert MergeConfig(preset=preset, recipe=default).resolve() == PRESETS[preset]


def test_a_reference_may_be_a_name() -> None:
    config = MergeConfig(preset="acts", recipe={"reference": "imdb"})
    assert config.resolve(["qnli", "imdb"]).reference == 1
    assert MergeConfig(preset="acts", recipe={"reference": "medoid"}).resolve(["qnli"]).reference == "medoid"
    with pytest.raises(UsageError, match="'imdb': must be first, medoid, a number from 0 to 1 or one of a, b"):
        config.resolve(["a", "b"])


@pytest.mark.parametrize(
    ("reference", "names", "meant"),
    [
        (1, ["a", "b"], 1),  # a number counts from 0
        ("1", ["1", "2"], 0),  # a text is a name
        (1, ["0", "1"], 1),  # and where both are the same adapter, no matter
        ("first", ["a", "first"], "first"),
        (1, ["1", "2"], r"= 1: counted from 0 that is '2', and another adapter is called '1'; give .* of 1, 2"),
        ("1", ["a", "b"], r"= '1': must be first, medoid, a number from 0 to 1 or one of a, b"),
        (2, ["a", "b"], r"= 2: must be first, medoid, a number from 0 to 1 or one of a, b"),
        (-1, ["a", "b"], r"= -1: must be first"),
    ],
)
def test_numbers_and_names_are_told_apart(reference: str | int, names: list[str], meant: Any) -> None:
    config = MergeConfig(preset="acts", recipe={"reference": reference})
    if meant == "first" or isinstance(meant, int):
        assert config.resolve(names).reference == meant
        return
    with pytest.raises(UsageError, match=f"merge.recipe.reference {meant}"):
        config.resolve(names)


def test_options_of_updates() -> None:
    config = MergeConfig(preset="svd", scale="sum", weights=[1, 2.0], recipe={"rank": 3})
    wanted = {"method": "svd", "weights": [1, 2.0], "scale": "sum", "rank": 3, "density": 0.2, "seed": 0}
    assert config.for_updates and config.update_options() == wanted
    assert MergeConfig(preset="cat").update_options()["scale"] == "mean"
    with pytest.raises(UsageError, match="merge.preset = 'svd': is for LoRA; bottleneck adapters have sum"):
        config.resolve()
    with pytest.raises(UsageError, match=r"merge.preset = 'select': LoRA adapters have cat, svd, ties, dare"):
        MergeConfig().update_options()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "preset": ({"preset": "mean"}, r"merge.preset = 'mean': must be one of sum, avg, wts, acts, acts\+, select, cat"),
    "weights": ({"weights": [1.0, "2"]}, r"merge.weights = \[1.0, '2'\]: must be finite numbers"),
    "infinite": ({"weights": [float("inf")]}, "must be finite numbers"),
    "no list": ({"weights": 3.0}, "merge.weights = 3.0: must be of type"),
    "scale": ({"scale": "median"}, "merge.scale = 'median': must be mean, sum or a number"),
    "tokens": ({"tokens": 0}, "merge.tokens = 0: must be at least 1"),
    "streams": ({"streams": "both"}, "merge.streams = 'both': must be one of own, shared"),
    "unknown stage": ({"recipe": {"solve": "emd"}}, r"merge.recipe.solve: preset select has balance, align"),
    "scale twice": ({"recipe": {"scale": "sum"}}, "merge.recipe.scale = 'sum': is merge.scale"),
    "stage": ({"recipe": {"solver": "greedy"}}, "merge.solver = 'greedy': must be one of assignment"),
    "pair": ({"preset": "avg", "recipe": {"width": 3}}, "merge.width = 3: merge.combine must be select"),
    "rank of cat": ({"preset": "cat", "recipe": {"rank": 3}}, "merge.recipe.rank = 3: must be .* and cat takes none"),
    "rank": ({"preset": "svd", "recipe": {"rank": 0}}, "merge.recipe.rank = 0: must be a whole number of at least 1"),
    "density": ({"preset": "ties", "recipe": {"density": 1.5}}, "merge.recipe.density = 1.5: must be above 0"),
    "seed": ({"preset": "dare", "recipe": {"seed": -1}}, "merge.recipe.seed = -1: must be a whole number"),
    "of LoRA": ({"preset": "svd", "recipe": {"ridge": 1.0}}, "merge.recipe.ridge: preset svd has rank, density, seed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        MergeConfig(**options)
