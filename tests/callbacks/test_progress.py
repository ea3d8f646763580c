"""The line that says where a run stands."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import pytest

from peft_lightning import TaskDataModule
from peft_lightning.callbacks.progress import ProgressLine
from peft_lightning.methods import FineTuneModule
from tests.toy import build, tiny


def _trainer(seconds: float, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ProgressLine(seconds)], **options
    )


@pytest.mark.parametrize(
    ("command", "stage", "rows"), [("validate", "validation", 256), ("test", "test", 256), ("predict", "predict", 256)]
)
def test_an_evaluation_has_a_line_a_batch(
    command: str, stage: str, rows: int, capsys: pytest.CaptureFixture[str], cache_dir: object
) -> None:
    module = build(FineTuneModule, task="toy_choice", backbone=tiny())
    trainer = _trainer(0.0)
    getattr(trainer, command)(
        module, datamodule=TaskDataModule(task="toy_choice", tokenizer="toy", eval_batch_size=100)
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "batch" in line]
    count = -(-rows // 100)
    assert [line.split("  ")[0] for line in lines] == [f"{stage} batch {n}/{count}" for n in range(1, count + 1)]
    assert lines[-1].endswith("0:00:00 left")
    assert all(float(line.split("  ")[1].removesuffix(" examples/s")) > 0 for line in lines)


def test_a_quick_evaluation_is_silent_and_training_shows_its_own_line(
    capsys: pytest.CaptureFixture[str], cache_dir: object
) -> None:
    module = build(FineTuneModule, task="toy_choice", backbone=tiny())
    trainer = _trainer(1000.0, max_steps=2, val_check_interval=2)
    trainer.fit(module, datamodule=TaskDataModule(task="toy_choice", tokenizer="toy"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "examples/s" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 2/2"]


def test_a_terminal_is_left_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache_dir: object
) -> None:
    module = build(FineTuneModule, task="toy_choice", backbone=tiny())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(ProgressLine, "_due", True)
    _trainer(0.0).validate(module, datamodule=TaskDataModule(task="toy_choice", tokenizer="toy"), verbose=False)
    written = capsys.readouterr().err
    assert "\rvalidation batch 1/" in written
    assert written.rstrip("\n").endswith("\r\x1b[K")
