"""Decisions follow the importance: counts, budgets, baselines, and the ranks of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.sparsify import DegenerateScoreError
from peft_lightning.layers.importance import Importance
from peft_lightning.layers.plan import PrunePlan, apply_plan
from peft_lightning.layers.planning import block_scores, decide_plan, needs_importance
from peft_lightning.layers.prune_config import ImportanceConfig, RankConfig, StructureConfig
from peft_lightning.layers.pruned_heads import attention_sites
from peft_lightning.layers.unit_costs import unit_costs
from tests.layers.test_pruned_heads import backbone

BERT = {"num_attention_heads": 4, "num_hidden_layers": 3}
PATHS = [f"encoder.layer.{i}" for i in range(3)]


def importance(heads: list[list[float]], **more: Any) -> Importance:
    named = {f"{path}.attention.self": torch.tensor(row).double() for path, row in zip(PATHS, heads, strict=True)}
    return Importance(heads=named, examples=1, tokens=1, **more)


HEADS = [[1.0, 2.0, 3.0, 4.0], [10.0, 10.0, 10.0, 10.0], [0.1, 9.0, 0.2, 0.1]]


def decide(scores: Importance | None, **options: Any) -> PrunePlan:
    settings = ImportanceConfig(**options.pop("importance", {}))
    prune, lora = StructureConfig(**options.pop("prune", {})), RankConfig(**options.pop("lora", {"high_blocks": 1}))
    model = backbone("bert", BERT)
    return decide_plan(model, scores, settings=settings, prune=prune, lora=lora, seed=options.pop("seed", 0))


def gone(plan: PrunePlan) -> list[list[int]]:
    return [[n for n in range(4) if n not in kept] for kept in plan.heads.values()]


def test_the_norm_decides_whose_heads_go() -> None:
    plan = decide(importance(HEADS), prune={"heads_to_prune": 4})
    assert gone(plan) == [[0], [], [0, 2, 3]]
    plan = decide(importance(HEADS), prune={"heads_to_prune": 4}, importance={"norm": "all"})
    assert gone(plan) == [[0], [], [0, 2, 3]]
    plan = decide(importance(HEADS), prune={"heads_to_prune": 6, "min_heads_per_layer": 0})
    assert gone(plan) == [[0, 1], [0], [0, 2, 3]]  # 2 / |1 2 3 4| is below 10 / |10 10 10 10|
    plan = decide(importance(HEADS), prune={"heads_to_prune": 6}, importance={"norm": "all"})
    assert gone(plan) == [[0, 1, 2], [], [0, 2, 3]]


def test_the_papers_share_is_the_default() -> None:
    assert sum(map(len, gone(decide(importance(HEADS))))) == 4  # 44 of 144 is 3.67 of 12


def test_blocks() -> None:
    sites = attention_sites(backbone("bert", BERT))
    raw = block_scores(importance(HEADS), sites, ImportanceConfig(blocks="raw"))
    assert raw == pytest.approx({PATHS[0]: 10.0, PATHS[1]: 40.0, PATHS[2]: 9.4})
    even = block_scores(importance(HEADS), sites, ImportanceConfig())
    assert even[PATHS[1]] > even[PATHS[0]] > even[PATHS[2]]  # how evenly the heads of a layer matter
    gates = {path: float(number) for number, path in enumerate(PATHS)}
    assert block_scores(importance(HEADS, blocks=gates), sites, ImportanceConfig(blocks="gate")) == gates
    with pytest.raises(UsageError, match="has no blocks measured by a gate; measure again"):
        block_scores(importance(HEADS), sites, ImportanceConfig(blocks="gate"))


@pytest.mark.parametrize("blocks", ["raw", "gate"])
def test_blocks_that_rank_nothing(blocks: str) -> None:
    gates = dict.fromkeys(PATHS, 0.0)
    with pytest.raises(DegenerateScoreError, match="that of the 3 blocks is all the same, or not finite"):
        decide(importance([[1.0, 2.0, 3.0, 4.0]] * 3, blocks=gates), importance={"blocks": blocks})


def test_a_target_needs_an_importance_that_ranks() -> None:
    flat = importance([[1.0] * 4] * 3, neurons=neurons())
    with pytest.raises(DegenerateScoreError, match="all 12 units have the same"):
        decide(flat, prune={"target": {"params": 0.9}}, lora={"rank": 4, "high_rank": 4})


def test_ranks_follow_the_blocks() -> None:
    assert list(decide(importance(HEADS)).ranks.values()) == [4, 8, 4]
    gates = {path: float(number) for number, path in enumerate(PATHS)}
    plan = decide(importance(HEADS, blocks=gates), importance={"blocks": "gate"})
    assert list(plan.ranks.values()) == [4, 4, 8]
    plan = decide(
        importance(HEADS), importance={"blocks": "raw"}, lora={"scheme": "proportional", "budget": 15, "high_blocks": 1}
    )
    # 12 ranks to share out beside one each: 2.02, 8.08 and 1.90 of them
    assert list(plan.ranks.values()) == [3, 9, 3]
    plan = decide(importance(HEADS), lora={"scheme": "proportional", "high_blocks": 1})
    assert sum(plan.ranks.values()) == 16


def test_random_heads_ignore_the_importance_and_ranks_do_not() -> None:
    plans = [decide(importance(HEADS), prune={"order": "random", "heads_to_prune": 5}, seed=seed) for seed in range(6)]
    assert all(sum(map(len, gone(plan))) == 5 and list(plan.ranks.values()) == [4, 8, 4] for plan in plans)
    assert len({str(gone(plan)) for plan in plans}) > 3
    assert decide(importance(HEADS), prune={"order": "random", "heads_to_prune": 5}, seed=3) == plans[3]


def test_without_a_decision_no_importance_is_needed() -> None:
    plain: dict[str, Any] = {"rank": 4, "high_rank": 4}
    plan = decide(None, prune={"heads_to_prune": 0}, lora=plain)
    assert gone(plan) == [[], [], []] and set(plan.ranks.values()) == {4}
    assert sum(map(len, gone(decide(None, prune={"order": "random"}, lora=plain)))) == 4
    cases: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
        ({}, {}, True),
        ({"heads_to_prune": 0}, plain, False),
        ({"heads_to_prune": 0, "ffn_to_prune": 3}, plain, True),
        ({"heads_to_prune": 0}, {}, True),
        ({"order": "random"}, plain, False),
        ({"target": {"params": 0.9}}, plain, True),
    ]
    for prune, lora, needed in cases:
        assert needs_importance(StructureConfig(**prune), RankConfig(**lora)) == needed


def neurons() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {path: torch.rand(32, generator=generator, dtype=torch.float64) for path in PATHS}


def test_neurons_go_by_count() -> None:
    scores = neurons()
    plan = decide(importance(HEADS, neurons=scores), prune={"heads_to_prune": 0, "ffn_to_prune": 0.25})
    assert sum(map(len, plan.neurons.values())) == 72
    scaled = {path: score / score.norm() for path, score in scores.items()}
    kept = torch.cat([scaled[path][list(plan.neurons[path])] for path in PATHS])
    every = torch.cat(list(scaled.values()))
    assert kept.min() >= every.sort().values[24]
    with pytest.raises(UsageError, match="importance: has no neurons; measure again"):
        decide(importance(HEADS), prune={"ffn_to_prune": 0.25})


def test_a_file_that_lacks_something_is_named() -> None:
    with pytest.raises(UsageError, match="^importance.file = some/rte.json: has no neurons; measure again with these"):
        decide(importance(HEADS), prune={"ffn_to_prune": 0.25}, importance={"file": "some/rte.json"})
    with pytest.raises(UsageError, match="^importance.file = some/rte.json: has no blocks measured by a gate; measure"):
        decide(importance(HEADS), importance={"blocks": "gate", "file": "some/rte.json"})
    with pytest.raises(UsageError, match="^importance.file = some/rte.json: is of another backbone .heads: "):
        decide(importance([[1.0, 2.0]] * 3), importance={"file": "some/rte.json"})


@pytest.mark.parametrize("measure", ["params", "flops"])
@pytest.mark.parametrize("order", ["importance", "random"])
def test_a_target_is_met(measure: str, order: str) -> None:
    prune = {"target": {measure: 0.8}, "order": order}
    plan = decide(importance(HEADS, neurons=neurons()), prune=prune, lora={"rank": 4, "high_rank": 4})
    model = backbone("bert", BERT)
    heads, inner, before = unit_costs(model, measure, 128)
    apply_plan(model, plan, None)
    left = unit_costs(model, measure, 128)[2]
    largest = max(*heads.values(), *inner.values())
    assert 0.8 * before - largest < left <= 0.8 * before
    assert any(gone(plan)) and any(len(kept) < 32 for kept in plan.neurons.values())


def test_a_target_that_cannot_be_met() -> None:
    with pytest.raises(
        UsageError, match=r"prune\.target = .*: cannot be met; with all gone that may go, [\d,]+ are left"
    ):
        decide(importance(HEADS, neurons=neurons()), prune={"target": {"params": 0.1}})
    plan = decide(importance(HEADS), prune={"target": {"params": 0.9}, "ffn_to_prune": 0})
    assert not plan.neurons and any(gone(plan))


def test_more_than_there_are_and_another_backbones_importance() -> None:
    with pytest.raises(UsageError, match=r"prune\.heads_to_prune = 13: must be a count from 0 to 12"):
        decide(importance(HEADS), prune={"heads_to_prune": 13})
    with pytest.raises(UsageError, match=r"heads_to_prune = 10: at most 9 of 12 can go if each layer keeps 1"):
        decide(importance(HEADS), prune={"heads_to_prune": 10})
    kept = decide(importance(HEADS), prune={"heads_to_prune": 12, "min_heads_per_layer": 0}).heads
    assert not any(kept.values())
    other = Importance(heads=dict(list(importance(HEADS).heads.items())[:2]), examples=1, tokens=1)
    with pytest.raises(UsageError, match=r"of another backbone \(heads: encoder\.layer\.2\.attention\.self 0 here 4\)"):
        decide(other)
    fewer = importance([row[:3] for row in HEADS])
    with pytest.raises(UsageError, match=r"of another backbone \(heads: encoder\.layer\.0\.attention\.self 3 here 4"):
        decide(fewer)
