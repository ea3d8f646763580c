"""The speed benchmark end to end on toy data: every arm is timed, and the table says against what."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from benchmarks import speed
from benchmarks.memory import memory_bytes, memory_names
from benchmarks.speed_table import speed_table
from peft_lightning.errors import PeftLightningError
from peft_lightning.study.records import RunRecord, read_record


def _ratio(record: RunRecord, name: str, reference: str) -> str:
    pairs = zip(record.series[name], record.series[reference], strict=True)
    return f"{median(a / b for a, b in pairs):.3f}"


def test_tiny(tmp_path: Path, cache_dir: Path) -> None:
    speed.main(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "speed.json")
    steps = {"full", "houlsby", "masks", "bf16", "pfeiffer", "parallel", "mam", "lora"}
    others = {"bare_loop", "lightning_fit", "passes", "score_snip", "score_grasp"}
    assert steps | others <= set(record.results)
    assert all(len(record.series[arm]) == 2 for arm in steps)
    text = speed_table(record)
    for name, reference, goal in (
        ("masks", "houlsby", 1.02),
        ("pfeiffer", "full", 0.71),
        ("lora", "full", 0.76),
        ("score_snip", "passes", 1.2),
        ("score_grasp", "passes", 3.5),
    ):
        assert f"| {_ratio(record, name, reference)} | at most {goal:.2f} |" in text
    memory = record.results["memory/lora"] / record.results["memory/full"]
    assert f"| {record.results['memory/lora'] / 2**20:.0f} | {memory:.2f} |" in text
    assert "Scores see 64 examples" in text


def test_lora_is_compared_with_its_peer_where_that_is() -> None:
    arms = {"full": 1.0, "lora": 0.7, "peft_lora": 0.8, "duel/lora": 0.7, "duel/peft_lora": 0.8}
    record = RunRecord(
        name="speed",
        status="finished",
        config={"rows": 32, "tokens": 64, "steps": 1, "rounds": 1, "threads": 2},
        data={},
        model={},
        seeds={},
        environment={"commit": "a", "dirty": False, "device": {"name": "p"}, "versions": {"torch": "2"}},
        results=arms,
        series={name: [seconds] for name, seconds in arms.items()},
    )
    line = "| LoRA over PEFT's, in four times as many turns | 700.0 | 0.875 | at most 1.00 |"
    assert line in speed_table(record)
    del record.results["peft_lora"], record.results["duel/peft_lora"]
    assert "PEFT" not in speed_table(record)


def test_memory_is_taken_of_every_arm_and_of_the_scores() -> None:
    names = [name for name in memory_names(tiny=False) if name.startswith("score_")]
    assert names == ["score_snip", "score_grasp"]
    assert memory_names(tiny=True) == ["full", "lora"]


def test_a_failed_process_is_an_error_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = tmp_path / "python"
    fails.write_text("#!/bin/sh\necho first >&2\necho no memory left >&2\nexit 3\n")
    fails.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fails))
    with pytest.raises(PeftLightningError, match=r"the process for lora ended with 3: no memory left"):
        memory_bytes("lora", tiny=True, threads=1, repeats=1)
