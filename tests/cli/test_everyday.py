"""Loggers, early stopping and the best few checkpoints from YAML, also in a run that goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peft_lightning.cli.main import main
from tests.cli.test_bad_input import FIT, ROOT

STOPPING = ["--config", str(ROOT / "configs/overlays/early_stopping.yaml")]
BEST_K = ["--config", str(ROOT / "configs/overlays/best_k.yaml")]
QUIET = ["--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


def state(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_logger_from_a_configuration(logger: str, tmp_path: Path) -> None:
    path = f"lightning.pytorch.loggers.{logger}"
    content = {"class_path": path, "init_args": {"save_dir": str(tmp_path / "logs"), "name": "mine"}}
    (tmp_path / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": content}}))
    main([*FIT, "--config", str(tmp_path / "logger.yaml"), "--run_dir", str(tmp_path / "run"), *QUIET])
    written = sorted(file.name for file in (tmp_path / "logs" / "mine" / "version_0").iterdir())
    assert any(name == "metrics.csv" or name.startswith("events.out") for name in written)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))  # ours stays
    assert any(row["val/loss"] for row in rows)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["scores"]


def test_early_stopping_and_the_best_few_in_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both overlays at once; the second half of a run ends as the whole one does."""
    overlays = [*STOPPING, *BEST_K, *QUIET, "--model.optim.lr=1e-12", "--save_every_n_steps=1"]
    words = [*FIT, *overlays, "--trainer.max_steps=30"]
    main([*words, "--run_dir", str(tmp_path / "whole")])
    whole = state(tmp_path / "whole" / "last.ckpt")
    assert 5 < whole["global_step"] < 30  # stopped
    said = capsys.readouterr().err
    assert "ended early: val/loss is no better than" in said and "for 5 validations" in said
    kept = {path.name for path in (tmp_path / "whole" / "best_k").iterdir()}
    assert len(kept) == 3
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    main([*words, "--run_dir", str(tmp_path / "whole"), "--resume", "auto"])  # stays ended
    assert state(tmp_path / "whole" / "last.ckpt")["global_step"] == whole["global_step"]

    class Enough(Exception):
        """In the middle."""

    from lightning.pytorch.callbacks import EarlyStopping

    seen, real = [], EarlyStopping.on_validation_end

    def stops(self: Any, trainer: Any, pl_module: Any) -> None:
        seen.append(trainer.global_step)
        if len(seen) == 4:
            raise Enough
        real(self, trainer, pl_module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "on_validation_end", stops)
        with pytest.raises((Enough, SystemExit)):
            main([*words, "--run_dir", str(tmp_path / "half")])
    # saved before the fourth validation, with which the run goes on
    assert state(tmp_path / "half" / "last.ckpt")["global_step"] == 4
    main([*words, "--run_dir", str(tmp_path / "half"), "--resume", "auto"])
    half = state(tmp_path / "half" / "last.ckpt")
    assert half["global_step"] == whole["global_step"]
    torch.testing.assert_close(half["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert {path.name for path in (tmp_path / "half" / "best_k").iterdir()} == kept


@pytest.mark.parametrize("option", ["stopping_threshold=99", "divergence_threshold=0", "patience=0"])
def test_a_run_that_was_stopped_otherwise_stays_stopped_too(option: str, tmp_path: Path) -> None:
    stops = [*STOPPING, f"--trainer.callbacks.init_args.{option}", "--trainer.callbacks.init_args.min_delta=50"]
    words = [*FIT, *stops, *QUIET, "--trainer.max_steps=30", "--run_dir", str(tmp_path / "run")]
    main(words)
    ended = state(tmp_path / "run" / "last.ckpt")["global_step"]
    assert ended < 30
    main([*words, "--resume", "auto"])
    assert state(tmp_path / "run" / "last.ckpt")["global_step"] == ended
    changed = [word for word in words if option not in word]
    main([*changed, "--resume", "changed"])  # which it was stopped under no more
    assert state(tmp_path / "run" / "last.ckpt")["global_step"] > ended


def test_a_step_that_is_repeated_leaves_one_file_among_the_best_few(tmp_path: Path) -> None:
    words = [*FIT, *BEST_K, *QUIET, "--trainer.max_steps=6", "--run_dir", str(tmp_path / "run")]
    main(words)
    kept = {path.name for path in (tmp_path / "run" / "best_k").iterdir()}
    for path in (tmp_path / "run").glob("*.ckpt"):
        path.unlink()  # as if it had been killed before the first
    main([*words, "--resume", "auto"])
    assert {path.name for path in (tmp_path / "run" / "best_k").iterdir()} == kept


def test_a_checkpoint_of_the_best_few_can_be_tested(tmp_path: Path) -> None:
    main([*FIT, *BEST_K, *QUIET, "--run_dir", str(tmp_path / "run")])
    path = next((tmp_path / "run" / "best_k").iterdir())
    main(["test", "--ckpt_path", str(path), "--run_dir", str(tmp_path / "tested")])
    assert json.loads((tmp_path / "tested" / "test.json").read_text())["scores"]
