"""Pretraining as a user runs it: fit, go on, measure where there is no cache, export, and build on the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from peft_lightning.cli.main import main
from tests.toy import toy_corpus

pytestmark = pytest.mark.xdist_group("pretraining")
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ["--config", "configs/sctd_pretrain.yaml", "--config", "configs/overlays/pretrain_cpu.yaml"]
SHORT = ["--data.block_size", "16", "--data.vocab_size", "300", "--model.drop.interval", "3"]
SHORT += ["--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", "4"]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


def corpus() -> str:
    return str(toy_corpus((("train", 256), ("validation", 32), ("test", 32))))


def pretrain(folder: Path, *words: str) -> None:
    main(["fit", *CONFIGS, *SHORT, "--data.inputs", corpus(), "--run_dir", str(folder), *words])


def fails(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err
    assert error.startswith("peft-lightning: error: ") and error.count("\n") == 1, error
    return error


def test_from_text_to_a_tuned_adapter(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pretrain(run, "--trainer.max_steps", "8")
    shown = capsys.readouterr().out
    assert "validation dropped loss" in shown and "steps with a teacher" in shown
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 8 and report["throughput"]["teacher_steps"] == 2

    # another machine: neither the packed corpus nor the trained tokenizer is there
    monkeypatch.setenv("PEFT_LIGHTNING_CACHE", str(tmp_path / "elsewhere"))
    for source in (run / "last.ckpt", run):
        main(["test", "--ckpt_path", str(source), "--trainer.enable_progress_bar", "false"])
        assert set(json.loads((run / "test.json").read_text())["scores"]) >= {"loss", "dropped_accuracy"}
    assert not list((tmp_path / "elsewhere").glob("wordpiece*"))

    out = tmp_path / "exported"
    main(["export", "--ckpt_path", str(run / "last.ckpt"), "--format", "transformers", "--out", str(out)])
    for folder in (out, run / "model"):
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == 4
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (run / "model").iterdir()
    }

    tuned = ["--config", "configs/sparse_adapter.yaml", "--config", "configs/overlays/cpu.yaml"]
    words = ["--data.task", "toy_sentiment", "--data.max_length", "16", "--model.backbone.name", str(out)]
    main(
        [
            "fit",
            *tuned,
            *words,
            "--trainer.max_steps",
            "2",
            "--trainer.max_epochs",
            "1",
            "--run_dir",
            str(tmp_path / "b"),
        ]
    )
    assert (tmp_path / "b" / "adapter").is_dir()

    capsys.readouterr()
    error = fails(capsys, ["export", "--ckpt_path", str(run), "--format", "peft", "--out", str(tmp_path / "no")])
    assert "SCTDPretrainModule can be written as transformers" in error
    error = fails(
        capsys,
        ["export", "--ckpt_path", str(tmp_path / "b"), "--format", "transformers", "--out", str(tmp_path / "no")],
    )
    assert "SparseAdapterModule can be written as adapterhub, peft, peft_lightning" in error


def test_going_on(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    pretrain(run, "--trainer.max_steps", "6", "--save_every_n_steps", "3")
    before = (run / "metrics.csv").read_text()
    pretrain(run, "--trainer.max_steps", "6", "--save_every_n_steps", "3", "--resume", "auto")
    assert (run / "metrics.csv").read_text() == before
    assert json.loads((run / "report.json").read_text())["steps"] == 6
    capsys.readouterr()
    shutil.rmtree(run)
    error = fails(capsys, ["fit", *CONFIGS, *SHORT, "--data.inputs", "/no/such/file.txt", "--run_dir", str(run)])
    assert "/no/such/file.txt" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.drop.keep", "0"], "drop.keep = 0"),
        (["--model.drop.interval", "0"], "drop.interval = 0: must be at least 1"),
        (["--model.backbone.config.num_hidden_layers", "3"], "num_hidden_layers = 3: token dropping needs 4"),
        (["--model.backbone.config.vocab_size", "100"], "the backbone embeds 100"),
        (["--data.block_size", "256"], "data.block_size = 256: the backbone has 128 positions"),
        (["--data.mask_rate", "1.5"], "mask_rate is 1.5"),
        (["--model.drop.preset", "bert"], "drop.preset = 'bert'"),
        (["--data.tokenizer", "toy"], "follows --model.backbone.tokenizer"),
    ],
)
def test_wrong_options(
    words: list[str], message: str, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["fit", *CONFIGS, *SHORT, "--data.inputs", corpus(), "--run_dir", str(tmp_path / "run")]
    assert message in fails(capsys, [*common, *words])


def test_bad_corpora(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["fit", *CONFIGS, *SHORT, "--run_dir", str(tmp_path / "run"), "--data.inputs"]
    for name, content in (
        ("empty.txt", b""),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 50),
        ("short.txt", b"a word or two"),
    ):
        (tmp_path / name).write_bytes(content)
        assert name in fails(capsys, [*common, str(tmp_path / name)])
