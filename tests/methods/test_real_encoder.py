"""A pretrained encoder on real data: a few steps, in both dtypes, from the command line and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_lightning import load
from peft_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real_data
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mrpc_from_the_command_line(
    dtype: str, encoder: str, shared_data: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])
    options = {
        "model.backbone.name": encoder,
        "model.backbone.dtype": dtype,
        "model.prune.score_batches": 2,
        "data.root": shared_data,
        "data.batch_size": 8,
        "data.max_length": 64,
        "trainer.max_steps": 4,
        "trainer.limit_val_batches": 4,
        "run_dir": tmp_path / "run",
    }
    configs = [f"--config={ROOT}/configs/{name}.yaml" for name in ("sparse_adapter", "overlays/cpu")]
    main(["fit", *configs, *(f"--{name}={value}" for name, value in options.items())])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["prunable_weights"] == 6 * 2 * 2 * 384 * 64
    assert report["kept_weights"] == report["prunable_weights"] - round(0.4 * report["prunable_weights"])
    assert (tmp_path / "run" / "last.ckpt").stat().st_size < 12_000_000  # the backbone alone is 90 MB
    pair = ("He said the food was good.", "The food was good, he said.")
    answer = load(tmp_path / "run" / "last.ckpt").predict([pair])[0]
    assert set(answer["probabilities"]) == {"not_equivalent", "equivalent"}
