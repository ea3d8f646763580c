"""Settings are checked when they are made, in one line that names the option."""

from __future__ import annotations

from typing import Any

import pytest

from peft_lightning.errors import UsageError
from peft_lightning.layers.prune_config import ImportanceConfig, RankConfig, StructureConfig


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ImportanceConfig, {"batches": 0}, r"importance\.batches = 0: must be at least 1"),
        (ImportanceConfig, {"norm": "l1"}, r"importance\.norm = 'l1': must be one of layer, all"),
        (ImportanceConfig, {"blocks": "sum"}, r"importance\.blocks = 'sum': must be one of normalised, raw, gate"),
        (ImportanceConfig, {"classifier_steps": -1}, r"classifier_steps = -1: must be at least 0"),
        (ImportanceConfig, {"file": ""}, r"importance\.file = '': must be a file of .*, its folder, or null"),
        (ImportanceConfig, {"file": "  "}, r"importance\.file = '  ': must be a file of .*, its folder, or null"),
        (StructureConfig, {"heads_to_prune": -1}, r"heads_to_prune = -1: must be a count of at least 0"),
        (StructureConfig, {"heads_to_prune": 1.0}, r"heads_to_prune = 1\.0: .* or a share in \[0, 1\)"),
        (StructureConfig, {"ffn_to_prune": 1.5}, r"ffn_to_prune = 1\.5: .* share in \[0, 1\)"),
        (StructureConfig, {"heads_to_prune": True}, r"heads_to_prune = True: must be of type"),
        (StructureConfig, {"min_heads_per_layer": -1}, r"min_heads_per_layer = -1: must be at least 0"),
        (StructureConfig, {"target_tokens": 0}, r"target_tokens = 0: must be at least 1"),
        (StructureConfig, {"order": "worst"}, r"order = 'worst': must be one of importance, random"),
        (StructureConfig, {"target": {"size": 0.5}}, r"target = .*: must be \{params: share\} or \{flops: share\}"),
        (StructureConfig, {"target": {"params": 0.5, "flops": 0.5}}, r"must be \{params: share\}"),
        (StructureConfig, {"target": {"params": 0}}, r"share in \(0, 1\]"),
        (StructureConfig, {"target": {"params": 1.2}}, r"share in \(0, 1\]"),
        (StructureConfig, {"target": {"params": 0.8}, "heads_to_prune": 3}, r"heads_to_prune = 3: follows from"),
        (StructureConfig, {"target": {"params": 0.8}, "heads_to_prune": 0, "ffn_to_prune": 0}, "so nothing may go"),
        (RankConfig, {"rank": 0}, r"lora\.rank = 0: must be at least 1"),
        (RankConfig, {"rank": 8, "high_rank": 4}, r"lora\.high_rank = 4: must be at least lora\.rank = 8"),
        (RankConfig, {"high_blocks": -1}, r"lora\.high_blocks = -1: must be at least 0, or null"),
        (RankConfig, {"init_std": 0.0}, r"lora\.init_std = 0\.0: must be above 0"),
        (RankConfig, {"budget": 64}, r"lora\.budget = 64: is for lora\.scheme proportional"),
        (RankConfig, {"scheme": "best"}, r"lora\.scheme = 'best': must be one of top, proportional"),
    ],
)
def test_bad_values(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "heads", "neurons"),
    [
        ({}, True, False),
        ({"heads_to_prune": 0}, False, False),
        ({"ffn_to_prune": 0.3}, True, True),
        ({"target": {"params": 0.8}}, True, True),
        ({"target": {"params": 0.8}, "ffn_to_prune": 0}, True, False),
        ({"target": {"flops": 0.8}, "heads_to_prune": 0}, False, True),
    ],
)
def test_what_may_go(options: dict[str, Any], heads: bool, neurons: bool) -> None:
    config = StructureConfig(**options)
    assert (config.takes_heads, config.takes_neurons) == (heads, neurons)


@pytest.mark.parametrize("word", [None, "null", "None"])
def test_null_is_no_file(word: str | None) -> None:
    """Also as the word that the command line makes of it."""
    assert ImportanceConfig(file=word) == ImportanceConfig()


def test_one_rank_is_lora() -> None:
    assert RankConfig().varied and RankConfig(scheme="proportional", high_rank=4).varied
    assert not RankConfig(rank=8).varied and not RankConfig(high_blocks=0).varied
