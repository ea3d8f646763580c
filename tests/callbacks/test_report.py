"""What a report says of a run, and what it leaves out where the figures would mislead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_lightning import FewShotDataModule, FineTuneModule, SCTDPretrainModule
from peft_lightning.callbacks.report import Report
from tests.toy import build, data, trainer


def fitted(folder: Path, method: Any = FineTuneModule, test: bool = False, **options: Any) -> dict[str, Any]:
    """The report of three steps, or of a test after them."""
    module, source = build(method), data(method=method)
    fit = trainer(folder, callbacks=[Report(folder)], **{"max_steps": 3, **options})
    fit.fit(module, datamodule=source)
    if test:
        fit.test(module, datamodule=source, verbose=False)
    report: dict[str, Any] = json.loads((folder / ("test.json" if test else "report.json")).read_text())
    return report


@pytest.mark.parametrize("method", [FineTuneModule, SCTDPretrainModule])
def test_a_run_without_a_validation_says_so(method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fitted(tmp_path, method)
    assert not (tmp_path / "best.ckpt").exists()
    assert report["scores"] == {} and not report.get("majority")
    assert report["no_validation"] == "the run ended before trainer.val_check_interval"
    printed = capsys.readouterr().out
    assert f"none: {report['no_validation']}" in printed
    assert "majority class" not in printed and "best" not in printed


def test_why_there_was_none(tmp_path: Path) -> None:
    assert "trainer.limit_val_batches 0" in fitted(tmp_path, limit_val_batches=0, val_check_interval=3)["no_validation"]


@pytest.mark.parametrize("limit", [2, 0.1])
@pytest.mark.parametrize("test", [False, True])
def test_a_score_of_a_few_batches_stands_alone(
    test: bool, limit: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trivial answer's is of the whole split, and would be compared with it."""
    option = f"limit_{'test' if test else 'val'}_batches"
    report = fitted(tmp_path, test=test, val_check_interval=3, **{option: limit})
    assert report["scores"] and report["majority"] == {} and "no_validation" not in report
    assert report["limit"] == f"trainer.{option} {limit}"
    table = capsys.readouterr().out.rpartition("FineTune on")[2]
    assert f"(trainer.{option} {limit})" in table and "majority class" not in table


@pytest.mark.parametrize("limit", [1.0, 10_000])
def test_a_whole_split_has_both_scores(limit: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fitted(tmp_path, val_check_interval=3, limit_val_batches=limit)
    assert report["majority"].keys() == {"accuracy"} and "limit" not in report
    assert "majority class" in capsys.readouterr().out


def test_what_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_lightning.callbacks.report.atomic_write", full)
    with pytest.raises(OSError, match="No space left"):
        fitted(tmp_path, val_check_interval=3)
    assert "majority class" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "said"), [("per_class", "3 a class, seed 13: 6 to"), ("total", "3 in all, seed 13: 3")]
)
def test_which_examples_were_drawn(mode: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = FewShotDataModule("toy_sentiment", shots=3, shots_mode=mode, test_rows=8)
    fit = trainer(tmp_path, callbacks=[Report(tmp_path)], max_epochs=1)
    fit.fit(build(FineTuneModule), datamodule=few)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["examples"] == few.regime() and report["majority"]["accuracy"] >= 0.5
    assert said in capsys.readouterr().out
    fit.test(datamodule=few, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert "examples" not in json.loads((tmp_path / "test.json").read_text())
