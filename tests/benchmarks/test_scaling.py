"""The scaling benchmark end to end on small models, and its arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling_arms import ARMS, build_arm, load_of
from benchmarks.scaling_model import MACHINES, Load, Machine, bounds, sending
from benchmarks.scaling_table import RANKS, scaling_table
from peft_lightning.study.records import read_record


@pytest.mark.xdist_group("scaling")
@pytest.mark.timeout(400)
def test_tiny(tmp_path: Path, cache_dir: Path) -> None:
    scaling.main(["--tiny", "--out", str(tmp_path)])
    record = read_record(tmp_path / "scaling.json")
    text, latency = scaling_table(record), median(record.series["latency"])
    for name in ARMS:
        ways = {way: record.series[f"{name}/{way}"] for way in ("alone", "beside", "together", "sending")}
        assert {len(seconds) for seconds in ways.values()} == {2}
        efficiency = median(a / b for a, b in zip(ways["alone"], ways["together"], strict=True))
        assert f"| {efficiency:.3f} |" in text
        paper = [
            beside + record.config["loads"][name]["passes"] / 2 * (sent + (record.config["parts"][name] - 1) * latency)
            for beside, sent in zip(ways["beside"], ways["sending"], strict=True)
        ]
        assert f"| {median(a / b for a, b in zip(ways['together'], paper, strict=True)):.3f} |" in text
        if "fsdp2" not in name:  # DDP has summed the bytes that stand on paper
            assert record.config["counted"][name] == record.config["bytes"][name] > 0
            assert record.config["summed_in"][name] == record.config["parts"][name] > 0
    assert all(machine.title in text for machine in MACHINES.values())
    assert RANKS[0] == 1 and RANKS[-1] == 256 and "steps/s on 256" in text


def test_what_is_summed_and_computed() -> None:
    """The tiny encoder: 40 words, 512 places, 2 types, 2 layers of width 32 with 64 neurons; 2 rows of 64 tokens."""
    D, F, S = 32, 64, 64
    layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    embeddings = (40 + 512 + 2) * D + 2 * D
    head = D * D + D + 2 * D + 2
    arm = build_arm("FineTune", "minilm", True, 2)
    load = load_of(arm, 2)
    assert load.bytes == 4 * (embeddings + 2 * layer + head)
    products = 2 * S * (4 * D * D + 2 * D * F) + 4 * S * S * D
    assert load.flops == 3 * 2 * (2 * products + 2 * (D * D + 2 * D)) and load.passes == 2  # two layers, pooler, head
    assert load_of(build_arm("FineTune", "minilm", True, 1), 2).flops == load.flops
    sharded = load_of(build_arm("FineTune-fsdp2", "minilm", True, 2), 2)
    assert (sharded.passes, sharded.parts, load.parts) == (3, 3, 1)
    sparse = load_of(build_arm("SparseAdapter", "minilm", True, 2), 2)
    arm_module: Any = build_arm("SparseAdapter", "minilm", True, 2).module
    bottleneck = arm_module.adapter.bottleneck
    one = 2 * S * D * bottleneck
    own = 3 * 4 * 2 * one - one  # four adapters of two matrices; below the first there is nothing to learn
    scores = 4 * S * S * D
    backbone = 2 * 2 * products - (2 * S * 4 * D * D + scores)  # the attention below the first adapter: forward only
    backbone += scores  # that of the second layer has two products for each of its own backwards
    assert sparse.flops == 2 * (own + backbone + 3 * 2 * (D * D + 2 * D))
    assert sparse.bytes < load.bytes
    fusion = load_of(build_arm("Fusion", "minilm", True, 2), 2)
    queries, keys = 2 * 2 * S * D * D, 2 * 2 * 2 * 2 * S * D * D  # of two layers; keys and values of two sources
    assert fusion.flops > 2 * (3 * (queries + keys) + 2 * products)


def test_a_step_by_hand() -> None:
    machine = Machine(title="", devices=4, flops=2e12, inside=1e9, between=5e8, latency=1e-3)
    load = Load(flops=1e12, bytes=10**8, passes=2, parts=5)
    assert sending(load, machine, 1) == 0
    assert sending(load, machine, 4) == pytest.approx(2 * 0.1 * 0.75 + 5 * 2e-3 * 2)
    within, between = 2 * 0.1 * 0.75, 2 * 0.2 * 0.5
    assert sending(load, machine, 8) == pytest.approx(within + between + 5 * 2e-3 * 3)
    assert bounds(load, machine, 8) == pytest.approx((0.5, 0.5 + within + between + 30e-3))
    assert bounds(load, machine, 1) == (0.5, 0.5)
