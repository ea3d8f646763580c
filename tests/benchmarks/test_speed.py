"""The speed benchmark end to end on toy data: every arm is timed, and the table says against what."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks import speed
from benchmarks.speed_table import speed_table
from peft_lightning.study.records import read_record


def test_tiny(tmp_path: Path, cache_dir: Path) -> None:
    speed.main(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "speed.json")
    arms = {"full", "houlsby", "masks", "bf16", "bare_loop", "lightning_fit"}
    assert arms <= set(record.results)
    assert all(len(record.series[arm]) == 2 for arm in ("full", "houlsby", "masks", "bf16"))
    table = speed_table(record)
    ratio = median(a / b for a, b in zip(record.series["masks"], record.series["houlsby"], strict=True))
    assert f"| {ratio:.3f} | at most 1.02 |" in table
