"""The merge benchmark end to end on small adapters, and what its table says of a record."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import merge
from benchmarks.merge_arms import Shape, adapters, naive_loop, own_passes
from benchmarks.merge_table import merge_table
from peft_lightning.errors import PeftLightningError
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import merge_adapters
from peft_lightning.study.records import RunRecord, read_record


def test_tiny(tmp_path: Path) -> None:
    merge.main(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "cpu.json")
    assert all(
        len(record.series[f"weights/{state}/{arm}"]) == 2
        for state in ("default", "fresh", "kept")
        for arm in ("wts", "naive")
    )
    text = merge_table(record)
    naive, ours = record.series["weights/default/naive"], record.series["weights/default/wts"]
    assert f"| {median(a / b for a, b in zip(naive, ours, strict=True)):.1f} | at least 30 |" in text
    passes = record.series["activations/acts_own"][0] / record.series["activations/passes_own"][0]
    assert f"| {passes:.2f} | at most 1.3 |" in text
    sizes = {name: value for name, value in record.results.items() if "/bytes/" in name}
    assert sizes["activations/bytes/acts/64"] == sizes["activations/bytes/acts/256"]
    assert sizes["activations/bytes/acts+/64"] == sizes["activations/bytes/acts+/256"]
    assert text.count("| at most 64 |") == len(sizes) == 4


def test_the_naive_loop_gives_what_the_preset_gives() -> None:
    """Not a race between different things."""
    sources = adapters(Shape(3, 1, 24, 6, 1, 8))
    merged = merge_adapters(None, sources, MergeConfig(preset="wts"))
    for name, tensor in naive_loop(sources)().items():
        torch.testing.assert_close(merged.tensors[name.replace(".sparse.", ".merged.")], tensor, rtol=1e-5, atol=1e-7)


def test_the_passes_are_those_of_all_adapters() -> None:
    shape = Shape(3, 2, 32, 6, 2, 8)
    backbone, sources, batches = shape.backbone(), adapters(shape), shape.batches(32)
    rows: list[int] = []
    backbone.embeddings.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    own_passes(backbone, sources, batches)()
    assert rows == [6, 6]


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*words: Any, **options: Any) -> Any:
        return type("Done", (), {"returncode": 3, "stderr": "one\nno memory\n", "stdout": ""})

    monkeypatch.setattr("benchmarks.merge.subprocess.run", fails)
    with pytest.raises(PeftLightningError, match="ended with 3: no memory"):
        merge.main(["--tiny"])


def test_the_table_shows_the_goals() -> None:
    series = {f"weights/{state}/wts": [0.1] for state in ("default", "fresh", "kept")}
    series |= {"weights/default/naive": [3.1], "weights/fresh/naive": [3.5], "weights/kept/naive": [0.7]}
    series |= {"activations/acts_own": [12.0], "activations/passes_own": [10.0]}
    series |= {
        "activations/acts_shared": [3.0],
        "activations/passes_shared": [1.5],
        "activations/bytes/acts/2048": [14e6],
    }
    record = RunRecord(
        name="merge",
        status="finished",
        config={
            "shape": {"count": 8, "layers": 12, "width": 768, "neurons": 64, "rows": 4, "length": 128},
            "turns": 1,
            "passes": 1,
            "threads": 1,
        },  # fmt: skip
        data={},
        model={},
        seeds={},
        environment={"commit": "a", "dirty": True, "device": {"name": "p"}, "versions": {"torch": "2"}},
        results={name: values[0] for name, values in series.items()},
        series=series,
    )
    text = merge_table(record)
    assert "| as the allocator likes | 100 | 3100 | 31.0 | at least 30 |" in text
    assert "| kept by the allocator after use | 100 | 700 | 7.0 |  |" in text
    assert "| each adapter on its own states | 12.00 | 10.00 | 1.20 | at most 1.3 |" in text
    assert "| `acts` | 2,048 | 14.0 | at most 64 |" in text
    assert "at 24 sites" in text and "commit a with changes" in text
