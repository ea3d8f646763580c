"""MerA and AdapterFusion on the command line: a run, its files, and answers without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_lightning.cli.main import main
from tests.toy import tiny, toy_sources

HERE = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


def words(method: str, task: str = "toy_sentiment") -> list[str]:
    """Options of a few-shot run on two sources."""
    sources = ", ".join(toy_sources(tiny(0.0)))
    model = ["--model", method, "--model.backbone", json.dumps(tiny(0.0)), f"--model.sources=[{sources}]"]
    return [*model, "--data", "FewShotDataModule", "--data.task", task, "--data.shots", "4", *HERE]


def refused(capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """The line of an error."""
    with pytest.raises(SystemExit) as caught:
        main(list(given))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_run_of_mera(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    preset = ["--model.merge.preset", "wts", "--model.merge.weights", "[2, 1]"]
    main(["fit", *words("MerAModule"), *preset, "--trainer.max_epochs=2", "--run_dir", str(run)])
    printed = capsys.readouterr().out
    assert "wts of source0, source1" in printed and "houlsby, width 16, 4 places" in printed
    report = json.loads((run / "report.json").read_text())
    assert report["merged"]["weights"] == [2.0, 1.0] and len(report["merged"]["sites"]) == 4
    assert (run / "merge.png").stat().st_size > 1000
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["merge"]["preset"] == "wts" and "zero_shot" not in config
    for path in (run, run / "best.ckpt", run / "adapter"):
        main(["test", "--ckpt_path", str(path), *HERE])
    line = refused(capsys, "test", "--ckpt_path", str(run), "--model.merge.preset", "avg")
    assert "merge.preset = avg, in the checkpoint wts: the checkpoint decides this" in line
    main(["fit", *words("MerAModule"), *preset, "--trainer.max_epochs=2", "--run_dir", str(run), "--resume", "auto"])


def test_a_run_of_fusion(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    main(["fit", *words("FusionModule"), "--trainer.max_epochs=1", "--run_dir", str(run)])
    assert "source0, source1 (houlsby, 4 places)" in capsys.readouterr().out
    main(["predict", "--ckpt_path", str(run / "last.ckpt"), *HERE])
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 256


@pytest.mark.parametrize("task", ["toy_sentiment", "toy_sentiment+prompt"])
def test_answers_without_training(
    task: str, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores: dict[str, Any] = {}
    for method in ("MerAModule", "FineTuneModule"):
        given = [word for word in words(method, task) if method == "MerAModule" or "sources" not in word]
        main(["test", "--zero_shot", "true", *given])
        folder = tmp_path / "runs" / f"{method.removesuffix('Module')}-{task}-42-zero_shot"
        assert {path.name for path in folder.iterdir()} == {"test.json"}
        report = json.loads((folder / "test.json").read_text())
        scores[method] = report["scores"]["loss"]
        assert ("merged" in report) == (method == "MerAModule")
        note = "note: the head of kind classify is new" in capsys.readouterr().out
        assert note == (task == "toy_sentiment")
    assert scores["MerAModule"] != scores["FineTuneModule"]
    main(["validate", "--zero_shot=true", *words("MerAModule", task), "--run_dir", str(tmp_path / "own")])
    assert json.loads((tmp_path / "own" / "validate.json").read_text())["merged"]["tokens"] > 0
    main(["predict", "--zero_shot=true", *words("MerAModule", task), "--run_dir", str(tmp_path / "own")])
    assert (tmp_path / "own" / "predictions.jsonl").exists()


def test_what_is_not_zero_shot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words("MerAModule")
    assert "--zero_shot: is for validate, test and predict" in refused(capsys, "fit", "--zero_shot=true", *given)
    both = ("--zero_shot=true", "--ckpt_path", str(tmp_path))
    assert "--zero_shot and --ckpt_path: give one of them" in refused(capsys, "test", *both, *given)
    assert "test: give --ckpt_path" in refused(capsys, "test", "--zero_shot=false", *given)
    assert "test: give --ckpt_path" in refused(capsys, "test", *given)
    pretraining = ["--model", "SCTDPretrainModule", "--model.backbone", json.dumps(tiny())]
    corpus = ["--data", "MLMDataModule", "--data.inputs", str(tmp_path), *HERE]
    folder = ["--run_dir", str(tmp_path / "x")]
    line = refused(capsys, "validate", "--zero_shot=true", *pretraining, *corpus, *folder)
    assert "--zero_shot: SCTDPretrainModule solves no task that could be tested" in line


def test_sources_are_asked_for_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for word in words("MerAModule") if "sources" not in word]
    run = ["--run_dir", str(tmp_path / "run")]
    assert "sources" in refused(capsys, "fit", *given, *run)
    missing = f"--model.sources=[{tmp_path / 'nowhere'}]"
    with pytest.raises(SystemExit):
        main(["fit", *given, missing, *run])
    assert "nowhere" in capsys.readouterr().err
