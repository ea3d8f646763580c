"""Merges at the level of whole backbones: what they must leave as it is, what the report says, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import Merged, MergeSource, merge_adapters, merged_config, needs_data
from tests.families import CELLS, backbone_setting, inputs
from tests.reference.calibration import alone, look
from tests.reference.merging import loop_ties

ALIGNED = ("wts", "acts", "acts+")
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel")


def backbone(family: str = "bert", **changes: Any) -> Any:
    torch.manual_seed(0)
    setting = backbone_setting(family)
    setting["config"] |= changes
    return build_backbone(BackboneConfig(**setting)).eval()


def source(bare: nn.Module, number: int, *, std: float = 0.3, masked: bool = False, **options: Any) -> MergeSource:
    """An adapter of random values, biases too."""
    config = AdapterConfig(**{"kind": "pfeiffer", "bottleneck": 6, **options})
    layers = attach_adapters(copy.deepcopy(bare), config, masked=masked)
    g = torch.Generator().manual_seed(100 + number)
    tensors, masks = {}, {}
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            tensors[f"{path}.{name}"] = std * torch.randn(parameter.shape, generator=g)
            if masked and parameter.ndim == 2:
                masks[f"{path}.{name}"] = torch.rand(parameter.shape, generator=g) < 0.5
                tensors[f"{path}.{name}"] *= masks[f"{path}.{name}"]
    return MergeSource(name=f"adapter {number}", adapter=config, tensors=tensors, masks=masks)


def permuted(given: MergeSource, seed: int) -> MergeSource:
    """The same function, the neurons of every site in another order."""
    tensors = dict(given.tensors)
    for name, down in given.tensors.items():
        if name.endswith("adapter_down.0.weight"):
            order = torch.randperm(len(down), generator=torch.Generator().manual_seed(seed))
            bias, up = (
                name.replace("adapter_down.0.weight", part) for part in ("adapter_down.0.bias", "adapter_up.weight")
            )
            tensors |= {name: down[order], bias: tensors[bias][order], up: tensors[up][:, order]}
    return replace(given, name=f"{given.name}, {seed}", tensors=tensors)


def named(given: MergeSource, name: str) -> MergeSource:
    return replace(given, name=name)


def batches(rows: int = 3, length: int = 7, count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of different tokens, with padding."""
    found = []
    for number in range(count):
        batch = inputs(rows, length)
        batch["input_ids"] = (batch["input_ids"] + 3 * number) % 25 * batch["attention_mask"] + 5
        found.append(batch)
    return found


def merged(bare: nn.Module | None, sources: list[MergeSource], preset: str, **options: Any) -> Merged:
    data = options.pop("data", batches())
    return merge_adapters(bare, sources, MergeConfig(**{"preset": preset, "tokens": 60, **options}), lambda: data)


def states(bare: nn.Module, given: MergeSource | Merged) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = alone(bare, given)[0](**inputs(3, 6)).last_hidden_state
    return hidden


# -- invariants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [cell for cell in CELLS if cell[1] in BOTTLENECKS])
def test_copies_merge_to_the_adapter_everywhere(family: str, kind: str) -> None:
    bare = backbone(family)
    given = source(bare, 0, kind=kind, scaling=2.0, cross=family == "bart" and kind == "houlsby")
    result = merged(bare, [named(given, "a"), named(given, "b"), named(given, "c")], "acts+")
    assert result.adapter.scaling == 1.0
    assert_close(states(bare, result), states(bare, given), rtol=1e-4, atol=1e-5)
    changed = (states(bare, given) - states(bare, source(bare, 1, kind=kind))).abs().max()
    assert changed > 1e-2


@pytest.mark.parametrize("streams", ["own", "shared"])
@pytest.mark.parametrize("preset", ["avg", *ALIGNED, "select"])
def test_copies_merge_to_the_adapter(preset: str, streams: str) -> None:
    bare = backbone()
    given = source(bare, 0, kind="houlsby")
    result = merged(bare, [named(given, "a"), named(given, "b")], preset, scale="mean", streams=streams)
    assert_close(states(bare, result), states(bare, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        {"combine": "ties", "density": 1.0},
        {"combine": "regmean"},
        {"solver": "emd", "marginals": "importance"},
        {"features": "all", "align": "weights", "metric": "inner"},
    ],
    ids=["ties", "regmean", "emd", "weights"],
)
def test_stages_other_than_a_presets_keep_copies_too(recipe: dict[str, Any]) -> None:
    bare = backbone()
    given = source(bare, 0)
    result = merged(bare, [given, permuted(given, 1), permuted(given, 2)], "acts", recipe=recipe)
    assert_close(states(bare, result), states(bare, given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", [*ALIGNED, "select"])
def test_neurons_in_another_order_merge_back(preset: str) -> None:
    bare = backbone()
    given = source(bare, 0, kind="houlsby", std=0.1)
    family = [given, permuted(given, 1), permuted(given, 2)]
    result = merged(bare, family, preset, scale="mean")
    assert_close(states(bare, result), states(bare, given), rtol=0, atol=1e-6)
    averaged = merged(bare, family, "avg")
    assert (states(bare, averaged) - states(bare, given)).abs().max() > 1e-2


@pytest.mark.parametrize("preset", ["sum", "avg", *ALIGNED])
def test_one_source_of_weight_1_is_unchanged_to_the_bit(preset: str) -> None:
    bare = backbone()
    given = source(bare, 0)
    result = merge_adapters(None, [given], MergeConfig(preset=preset))
    assert result.tensors.keys() == {name.replace(".sparse.", ".merged.") for name in given.tensors}
    for name, tensor in given.tensors.items():
        assert torch.equal(result.tensors[name.replace(".sparse.", ".merged.")], tensor)


@pytest.mark.parametrize("streams", ["own", "shared"])
def test_acts_plus_does_not_depend_on_the_order(streams: str) -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(3)]
    first = states(bare, merged(bare, family, "acts+", streams=streams))
    for order in permutations(range(3)):
        result = merged(bare, [family[i] for i in order], "acts+", streams=streams)
        assert_close(states(bare, result), first, rtol=1e-4, atol=1e-5)
    ends = [states(bare, merged(bare, [family[i] for i in order], "acts")) for order in ((0, 1, 2), (2, 1, 0))]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ALIGNED)
def test_a_narrow_and_a_wide_adapter_of_one_function_merge_to_it(preset: str) -> None:
    """The wide one has the narrow one's neurons somewhere, and others that say nothing."""
    bare = backbone()
    narrow = source(bare, 0, bottleneck=5, std=0.1)
    more = source(bare, 1, bottleneck=3, std=0.1)
    tensors = {}
    for name, tensor in narrow.tensors.items():
        silent = torch.zeros_like(more.tensors[name]) if name.endswith("adapter_up.weight") else more.tensors[name]
        joined = (
            tensor
            if name.endswith("adapter_up.bias")
            else torch.cat([tensor, silent], int(name.endswith("adapter_up.weight")))
        )
        tensors[name] = joined
    wide = permuted(MergeSource(name="wide", adapter=replace(narrow.adapter, bottleneck=8), tensors=tensors), 7)
    for pair in ([narrow, wide], [wide, narrow]):
        result = merged(bare, pair, preset)
        assert result.adapter.bottleneck == 8 == merged_config(pair, MergeConfig(preset=preset)).bottleneck
        assert_close(states(bare, result), states(bare, narrow), rtol=0, atol=2e-6)


def test_two_merges_of_the_same_are_equal_to_the_bit() -> None:
    bare = backbone()
    family = [source(bare, number, kind="houlsby") for number in range(3)]
    one, other = (merged(bare, family, "acts+") for _ in range(2))
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.report == other.report


def test_subtracting_an_adapter_from_itself_leaves_nothing() -> None:
    bare = backbone()
    given = source(bare, 0)
    result = merged(bare, [named(given, "a"), permuted(given, 3)], "acts", weights=[1.0, -1.0], scale="sum")
    with torch.no_grad():
        assert_close(states(bare, result), bare(**inputs(3, 6)).last_hidden_state, rtol=0, atol=1e-5)
    site = next(iter(result.report["sites"].values()))
    assert site["output_error"] == pytest.approx(1, abs=1e-4)  # of half the difference, which is 0 but for rounding
    assert result.report["outputs"] == [1.0, -1.0]


@pytest.mark.parametrize("masks", ["union", "budget"])
def test_sparse_adapters_merge_to_the_union_or_to_a_budget_of_their_masks(masks: str) -> None:
    bare = backbone()
    family = [source(bare, number, masked=True) for number in range(2)]
    result = merged(bare, family, "avg", recipe={"masks": masks})
    assert result.masks.keys() == {name for name in result.tensors if name.endswith("weight")}
    kept = 0
    for name, mask in result.masks.items():
        union = family[0].masks[old(name)] | family[1].masks[old(name)]
        assert not (result.tensors[name] * ~mask).any() and not (mask & ~union).any()
        assert masks == "budget" or torch.equal(mask, union)
        kept += int(mask.sum())
    if masks == "budget":
        wanted = sum(int(mask.sum()) for given in family for mask in given.masks.values()) / 2
        assert abs(kept - wanted) <= len(result.masks)
    aligned = merged(bare, family, "acts+")  # refitted on the masks' support
    assert aligned.masks and all(not (aligned.tensors[n] * ~mask).any() for n, mask in aligned.masks.items())
    states(bare, aligned)


@pytest.mark.parametrize("preset", ["sum", "avg", "wts", "acts", "acts+", "select", "cat", "svd", "ties", "dare"])
def test_what_masks_remove_is_zero_whatever_the_file_holds_there(preset: str) -> None:
    bare = backbone()
    kind = "lora" if preset in ("cat", "svd", "ties", "dare") else "pfeiffer"
    clean = [source(bare, number, kind=kind, masked=True) for number in range(2)]
    dirty = [other_tensors(given, lambda n, t, m=given.masks: t if n not in m else t + 5 * ~m[n]) for given in clean]  # type: ignore[misc]
    wanted, got = merged(bare, clean, preset), merged(bare, dirty, preset)
    assert_close(got.tensors, wanted.tensors, rtol=0, atol=0)
    assert got.report == wanted.report and got.masks.keys() == wanted.masks.keys()


def test_a_mask_of_another_shape() -> None:
    given = source(backbone(), 0, masked=True)
    name = next(iter(given.masks))
    for masks in ({name: given.masks[name][:2]}, {"ghost": given.masks[name]}):
        with pytest.raises(CheckpointError, match="adapter 0: .* is no tensor of its mask's shape"):
            replace(given, masks=masks).sites()


def old(name: str) -> str:
    return name.replace(".merged.", ".sparse.")


# -- what activations come from -------------------------------------------------------------------------------------


def test_the_report_says_what_a_slow_look_at_every_token_finds() -> None:
    bare = backbone()
    family = [source(bare, number, kind="houlsby", scaling=2.0) for number in range(3)]
    weights = [1.0, 2.0, 0.5]
    data = batches(count=3)
    result = merged(bare, family, "acts", data=data, tokens=10_000, weights=weights, scale="sum")
    seen = [look(bare, given, data) for given in family]
    assert (
        result.report["tokens"]
        == sum(int(batch["attention_mask"].sum()) for batch in data)
        == len(seen[0]["encoder.layer.0.output"].before)
    )
    for site, figures in result.report["sites"].items():
        z = [one[site].before for one in seen]
        assert figures["reference"] == "adapter 0"
        assert figures["cost"][0] == 0 and figures["cosine"][0] == 1
        for number in (1, 2):
            cost, cosine = best_match(z[number], z[0])
            assert figures["cost"][number] == pytest.approx(cost, rel=1e-4)
            assert figures["cosine"][number] == pytest.approx(cosine, rel=1e-4)
    exact = merged(bare, family, "acts+", data=data, tokens=10_000, weights=weights, scale="sum")
    own = look(bare, replace_tensors(exact, before_repair(bare, family, data, weights)), data)
    for site, figures in exact.report["sites"].items():
        output = own[site].after @ exact.tensors[f"{site}.adapters.merged.adapter_up.weight"].double().t()
        output += exact.tensors[f"{site}.adapters.merged.adapter_up.bias"].double()
        total = torch.stack([weight * one[site].output for weight, one in zip(weights, seen, strict=True)]).sum(0)
        error = (output - total).norm() / total.norm()
        assert figures["scaled_output_error"] == pytest.approx(float(error), rel=1e-3)
        error = (output - total / sum(weights)).norm() / (total / sum(weights)).norm()
        assert figures["output_error"] == pytest.approx(float(error), rel=1e-3)
    assert exact.report["error_tokens"] == exact.report["tokens"]


def before_repair(bare: nn.Module, family: list[MergeSource], data: Any, weights: list[float]) -> Merged:
    options: dict[str, Any] = {"data": data, "tokens": 10_000, "weights": weights, "scale": "sum"}
    return merged(bare, family, "acts+", recipe={"repair": "none"}, **options)


def replace_tensors(result: Merged, unrepaired: Merged) -> MergeSource:
    return MergeSource(name="merged", adapter=result.adapter, tensors=unrepaired.tensors)


def best_match(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean distance and cosine of the best assignment of columns, found among all of them."""
    size = one.shape[1]
    scale = len(one) ** 0.5
    cost = [[float((one[:, i] - other[:, j]).norm()) / scale for j in range(size)] for i in range(size)]
    order = min(permutations(range(size)), key=lambda order: sum(cost[i][j] for i, j in enumerate(order)))
    cosines = [float(torch.cosine_similarity(one[:, i], other[:, j], dim=0)) for i, j in enumerate(order)]
    return sum(cost[i][j] for i, j in enumerate(order)) / size, sum(cosines) / size


def norm_at(site: str, tensors: Mapping[str, Tensor]) -> float:
    parts = [t.square().sum() for name, t in tensors.items() if name.startswith(site) and name.endswith("weight")]
    return float(torch.stack(parts).sum().sqrt())


def test_norm_ratio_is_that_of_the_matrices() -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(2)]
    result = merge_adapters(None, family, MergeConfig(preset="avg"))
    for site, figures in result.report["sites"].items():
        norms = [norm_at(site, tensors) for tensors in (result.tensors, *(given.tensors for given in family))]
        assert figures["norm_ratio"] == pytest.approx(2 * norms[0] / (norms[1] + norms[2]), rel=1e-5)
        assert "output_error" not in figures and "cost" not in figures


def test_a_report_without_data_has_no_output_error_and_with_data_it_has() -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(2)]
    for preset in ("sum", "avg", "wts"):
        without = merge_adapters(None, family, MergeConfig(preset=preset))
        with_data = merged(bare, family, preset, tokens=80)
        assert all(torch.equal(t, with_data.tensors[name]) for name, t in without.tensors.items())
        assert all("output_error" not in site for site in without.report["sites"].values())
        assert all(site["output_error"] > 0.1 for site in with_data.report["sites"].values())
        assert without.report["tokens"] == without.report["error_tokens"] == 0 == with_data.report["tokens"]
        assert 10 <= with_data.report["error_tokens"] < 20  # an eighth of the tokens, whole rows
        json.dumps([without.report, with_data.report], allow_nan=False)


def test_select_says_how_many_neurons_of_each_stay() -> None:
    bare = backbone()
    loud, silent = source(bare, 0, nonlinearity="tanh"), source(bare, 1, nonlinearity="tanh", std=1e-4)
    result = merged(bare, [loud, silent], "select")
    for figures in result.report["sites"].values():
        assert figures["kept"] == [6, 0] and figures["scaled_output_error"] < 1e-2


def test_the_backbone_is_not_changed_and_its_own_adapters_take_no_part() -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(2)]
    clean = merged(bare, family, "acts+")
    adapted = copy.deepcopy(bare)
    torch.manual_seed(5)
    attach_adapters(adapted, AdapterConfig(kind="pfeiffer", name="there", init_std=1.0))
    attach_adapters(adapted, AdapterConfig(kind="lora", name="there", init_std=1.0))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted.train()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in adapted.state_dict(keep_vars=True).items()}
    hooks = [len(module._forward_hooks) for module in adapted.modules()]
    random = torch.get_rng_state()
    for streams in ("own", "shared"):
        result = merged(adapted, family, "acts+", streams=streams)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in adapted.modules())
    assert hooks == [len(module._forward_hooks) for module in adapted.modules()]
    for name, tensor in adapted.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])
    result = merged(adapted, family, "acts+")
    assert all(torch.equal(tensor, result.tensors[name]) for name, tensor in clean.tensors.items())


def test_statistics_stay_below_64_mb_whatever_the_number_of_tokens() -> None:
    """8 adapters, 24 sites, 64 neurons: what moments take does not depend on the model's width."""
    bare = backbone(num_hidden_layers=12)
    family = [source(bare, number, kind="houlsby", bottleneck=64) for number in range(8)]
    found = set()
    for preset, tokens in (("acts", 18), ("acts+", 18), ("acts+", 180)):
        result = merged(bare, family, preset, tokens=tokens, data=batches(count=12))
        assert len(result.report["sites"]) == 24 and tokens <= result.report["tokens"] < tokens + 18
        found.add((preset, result.report["statistics_bytes"]))
    assert len(found) == 2 and all(20e6 < size < 64e6 for _, size in found)


# -- LoRA -----------------------------------------------------------------------------------------------------------


def updates(bare: nn.Module, given: MergeSource | Merged) -> dict[str, Tensor]:
    """dW of every linear map, by folding it in."""
    model, layers = alone(bare, given)
    found = {}
    for site, layer in layers.items():
        linear = model.get_submodule(site)
        before = linear.weight.detach().double().clone()
        layer.merge(linear)
        found[site] = linear.weight.detach().double() - before
    return found


def test_lora_concatenation_reproduces_the_weighted_sum_of_updates() -> None:
    bare = backbone().double()
    family = [source(bare, number, kind="lora", bottleneck=2 + number, scaling=0.5 + number) for number in range(3)]
    weights = [1.0, -2.0, 0.5]
    result = merged(None, family, "cat", weights=weights, scale="sum")
    assert (result.adapter.bottleneck, result.adapter.scaling) == (2 + 3 + 4, 1.0)
    parts = [updates(bare, given) for given in family]
    for site, update in updates(bare, result).items():
        total = sum(weight * part[site] for weight, part in zip(weights, parts, strict=True))
        assert_close(update, total, rtol=0, atol=1e-6)
        figures = result.report["sites"][site]
        assert figures["update_error"] < 1e-6 and figures["lost"] == 0
        norms = [float(part[site].norm()) for part in parts]
        assert figures["norm_ratio"] == pytest.approx(3 * float(update.norm()) / sum(norms), rel=1e-4)
        cosines = [float((update * part[site]).sum() / update.norm() / part[site].norm()) for part in parts]
        assert figures["cosine"] == pytest.approx(cosines, abs=1e-4)
    assert len(result.report["sites"]) == 4  # query and value of both layers


@pytest.mark.parametrize("preset", ["svd", "ties", "dare"])
@pytest.mark.parametrize("rank", [None, 2, 12])
def test_lora_cut_to_a_rank_fits_one_setting(preset: str, rank: int | None) -> None:
    bare = backbone()
    family = [source(bare, number, kind="lora", bottleneck=3 + number) for number in range(2)]
    options: dict[str, Any] = {"recipe": {"rank": rank}} if rank else {}
    result = merged(None, family, preset, **options)
    wanted = rank or 4
    assert (
        result.adapter.bottleneck == wanted == merged_config(family, MergeConfig(preset=preset, **options)).bottleneck
    )
    assert {tensor.shape[0] for name, tensor in result.tensors.items() if name.endswith("lora_A")} == {wanted}
    states(bare, result)
    if preset == "svd" and rank == 12:  # more than there is: exact
        mean = [
            sum(part[site] for part in map(lambda one: updates(bare, one), family)) / 2
            for site in result.report["sites"]
        ]
        for update, total in zip(updates(bare, result).values(), mean, strict=True):
            assert_close(update, total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["svd", "ties", "dare"])
def test_lora_of_other_ranks_and_scalings_is_merged_as_whole_updates(preset: str) -> None:
    """At a rank that holds all; below it, the largest rank of theirs, what is nearest to that."""
    bare = backbone().double()
    family = [source(bare, n, kind="lora", bottleneck=2 + 3 * n, scaling=0.5 + n) for n in range(2)]
    density = 1.0 if preset == "dare" else 0.3
    recipe = {"density": density} if preset != "svd" else {}
    whole = merged(None, family, preset, recipe={**recipe, "rank": 16})
    cut = merged(None, family, preset, recipe=recipe)
    assert cut.adapter.bottleneck == 5
    parts, nearest = [updates(bare, given) for given in family], updates(bare, cut)
    for site, update in updates(bare, whole).items():
        values = [part[site] for part in parts]
        wanted = loop_ties(values, [1.0, 1.0], density) if preset == "ties" else (values[0] + values[1]) / 2
        assert_close(update, wanted, rtol=0, atol=1e-5)
        lost = torch.linalg.svdvals(wanted)[5:].norm() / wanted.norm()
        assert cut.report["sites"][site]["lost"] == pytest.approx(float(lost), rel=1e-3, abs=1e-6)
        assert float((nearest[site] - wanted).norm() / wanted.norm()) == pytest.approx(float(lost), rel=1e-3, abs=1e-5)


def test_sparse_lora_keeps_its_masks_side_by_side() -> None:
    bare = backbone()
    family = [source(bare, 0, kind="lora", masked=True), source(bare, 1, kind="lora")]
    result = merged(None, family, "cat")
    for name, mask in result.masks.items():
        dim = int(name.endswith("lora_B"))
        first, second = mask.chunk(2, dim)
        assert torch.equal(first, family[0].masks[old(name)]) and second.all()
        assert not (result.tensors[name] * ~mask).any()
    assert not merged(None, family, "svd").masks


# -- what is refused ------------------------------------------------------------------------------------------------


def other_tensors(given: MergeSource, change: Callable[[str, Tensor], Tensor | None]) -> MergeSource:
    tensors = {name: new for name, tensor in given.tensors.items() if (new := change(name, tensor)) is not None}
    return replace(given, tensors=tensors)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kind": ({}, {"kind": "houlsby"}, "adapter.kind: adapter 0 has 'pfeiffer', adapter 1 has 'houlsby'"),
    "nonlinearity": ({}, {"nonlinearity": "gelu"}, "adapter.nonlinearity: adapter 0 has 'relu', adapter 1 has 'gelu'"),
    "sites": ({}, {"target": r"layer\.0\."}, r"only adapter 0 has one at encoder\.layer\.1\.output"),
    "linear maps": (
        {"kind": "lora", "target": "query|value"},
        {"kind": "lora", "target": "query"},
        r"adapter.target: adapter 0 and adapter 1 are at different sites; only adapter 0 has one at .*0.*value",
    ),
    "prefixes": ({"kind": "mam"}, {"kind": "mam"}, "prefixes have no neurons to match"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_become_one(case: str) -> None:
    bare = backbone()
    one, other, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        merged(bare, [source(bare, 0, **one), source(bare, 1, **other)], "svd" if "lora" in one.values() else "avg")


def test_numbers_that_do_not_stay_finite() -> None:
    """What is written is finite; what would not be is refused, by each kind of merge."""
    bare = backbone()
    low, wide = ([source(bare, number, kind=kind) for number in range(2)] for kind in ("lora", "pfeiffer"))
    huge = [
        other_tensors(one, lambda name, tensor: tensor * 1e30 if "weight" in name or "lora" in name else tensor)
        for one in (*low, *wide)
    ]
    with pytest.raises(UsageError, match="the merged adapter holds inf or NaN"):
        merged(None, huge[:2], "cat", weights=[3e38, 3e38])
    for preset, scale in (("cat", 1e60), ("wts", 1e60), ("wts", 0.0)):
        with pytest.raises(UsageError, match=r"merge.scale = .*finite and not zero"):
            merged(None, low if preset == "cat" else wide, preset, scale=scale)
    for preset in ("svd", "ties", "wts"):
        with pytest.raises(UsageError, match=r"merge.weights = \[1e\+39, 1e\+39\]: must be finite in float32"):
            merged(None, wide if preset == "wts" else low, preset, weights=[1e39, 1e39])
    with pytest.raises(UsageError, match="not finite"):
        merged(bare, [wide[0], named(huge[3], "other")], "select")
    with pytest.raises(UsageError, match=r"merge.rank = 100: must be at most \d+, the rank of the largest matrix"):
        merged(None, low, "svd", recipe={"rank": 100})


def test_wrong_numbers_and_names() -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(2)]
    with pytest.raises(UsageError, match="must be at least one"):
        merged(bare, [], "avg")
    with pytest.raises(UsageError, match="two are called 'a'"):
        merged(bare, [named(family[0], "a"), named(family[1], "a")], "avg")
    with pytest.raises(UsageError, match=r"merge.weights = \[1.0\]: must be 2, one for each adapter"):
        merged(bare, family, "avg", weights=[1.0])
    with pytest.raises(UsageError, match=r"merge.recipe.reference = 2: must be .* a number from 0 to 1"):
        merged(bare, family, "wts", recipe={"reference": 2})
    with pytest.raises(UsageError, match="a number from 0 to 1 or one of adapter 0, adapter 1"):
        merged(bare, family, "wts", recipe={"reference": "adapter 2"})
    with pytest.raises(UsageError, match=r"merge.width = 13: must be at most 12"):
        merged_config(family, MergeConfig(preset="select", recipe={"width": 13}))
    with pytest.raises(UsageError, match="LoRA adapters have cat, svd, ties, dare"):
        merged(None, [source(bare, 0, kind="lora")], "avg")
    with pytest.raises(UsageError, match="is for LoRA; bottleneck adapters have"):
        merged(bare, family, "svd")


def test_a_reference_by_its_name() -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(3)]
    by_name, by_number = (merged(bare, family, "acts", recipe={"reference": r}) for r in ("adapter 2", 2))
    assert all(torch.equal(tensor, by_number.tensors[name]) for name, tensor in by_name.tensors.items())
    assert {site["reference"] for site in by_name.report["sites"].values()} == {"adapter 2"}


def test_activations_need_data_and_weights_do_not() -> None:
    bare = backbone()
    family = [source(bare, number) for number in range(2)]
    needy = {preset: needs_data(family, MergeConfig(preset=preset)) for preset in ("sum", "avg", *ALIGNED, "select")}
    assert needy == {"sum": False, "avg": False, "wts": False, "acts": True, "acts+": True, "select": True}
    assert not needs_data(family[:1], MergeConfig())
    assert not needs_data([source(bare, 0, kind="lora")], MergeConfig(preset="cat"))
    with pytest.raises(UsageError, match=r"merge.preset = 'acts': needs unlabelled data"):
        merge_adapters(bare, family, MergeConfig(preset="acts"))
    empty = [{name: torch.zeros_like(tensor) for name, tensor in batch.items()} for batch in batches()]
    for data in ([], empty):
        with pytest.raises(UsageError, match="there are no activations"):
            merged(bare, family, "acts", data=data)


def test_the_width_must_not_depend_on_the_data() -> None:
    bare = backbone()
    family = [source(bare, 0, bottleneck=4), source(bare, 1, bottleneck=6)]
    recipe = {"solver": "emd", "reference": "medoid"}
    with pytest.raises(UsageError, match="the result's width would depend on the data"):
        merged_config(family, MergeConfig(preset="wts", recipe=recipe))
    result = merged(bare, family, "wts", recipe={"solver": "emd"})
    assert result.adapter.bottleneck == 4
    states(bare, result)


def test_tensors_that_are_missing_strange_or_of_another_shape() -> None:
    bare = backbone()
    good = source(bare, 0)
    cases = {
        "adapter_up.bias is missing": lambda n, t: (
            None if n.endswith("0.output.adapters.sparse.adapter_up.bias") else t
        ),
        "down_bias_R has shape": lambda n, t: t[:3] if n.endswith("adapter_down.0.bias") else t,
    }
    for message, change in cases.items():
        with pytest.raises(CheckpointError, match=f"adapter 0: encoder.layer.0.output: {message}"):
            merged(bare, [other_tensors(good, change)], "avg")
    strange = replace(good, tensors={**good.tensors, "pooler.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"pooler\.weight is no tensor of the adapter 'sparse'"):
        merged(bare, [strange], "avg")
    broken = other_tensors(good, lambda n, t: torch.full_like(t, torch.inf))
    with pytest.raises(UsageError, match="holds inf or NaN"):
        merged(bare, [broken], "avg")


def test_adapters_of_another_backbone_are_refused_where_there_is_data() -> None:
    deep, shallow = backbone(num_hidden_layers=3), backbone()
    family = [source(deep, number) for number in range(2)]
    for streams in ("own", "shared"):
        with pytest.raises(UsageError, match=r"encoder\.layer\.2\.output is not"):
            merged(shallow, family, "acts", streams=streams)


def test_nothing_is_kept_but_plain_values_in_the_report() -> None:
    bare = backbone()

    def plain(value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(type(key) is str and plain(entry) for key, entry in value.items())
        return (
            all(map(plain, value)) if type(value) is list else value is None or type(value) in (str, int, float, bool)
        )

    for preset in ("acts+", "select"):
        assert plain(merged(bare, [source(bare, number) for number in range(2)], preset).report)
    emd = merged(bare, [source(bare, number) for number in range(2)], "acts", recipe={"solver": "sinkhorn"})
    assert plain(emd.report) and all("marginal_residual" in site for site in emd.report["sites"].values())
