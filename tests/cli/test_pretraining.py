"""Pretraining as a user runs it: fit, go on, measure where there is no cache, export, and build on the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from peft_lightning.callbacks.checkpoint import RunCheckpoint
from peft_lightning.cli.main import main
from peft_lightning.methods import SCTDPretrainModule
from tests.toy import build, data, toy_corpus, trainer

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
    """A run that is told to end after three steps, and the same command again, leave what an undisturbed run leaves."""
    whole, parts, words = tmp_path / "whole", tmp_path / "parts", ["--trainer.max_steps", "8"]
    pretrain(whole, *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCheckpoint, "_asked_to_stop", lambda self, trainer: trainer.global_step == 3)
        with pytest.raises(SystemExit):
            pretrain(parts, *words)
    assert "after step 3" in capsys.readouterr().err
    pretrain(parts, *words, "--resume", "auto")
    assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()
    assert (whole / "model" / "model.safetensors").read_bytes() == (parts / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    run = tmp_path / "run"
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


def test_a_checkpoint_that_does_not_say_its_corpus(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One from Python: measuring it on other texts without a word would be a wrong number."""
    module = build(SCTDPretrainModule)
    trainer(tmp_path, max_steps=2).fit(module, datamodule=data(method=SCTDPretrainModule))
    path = str(tmp_path / "last.ckpt")
    assert "give --data.inputs, the texts to read" in fails(capsys, ["test", "--ckpt_path", path])
    main(["test", "--ckpt_path", path, "--data.inputs", corpus(), "--data.block_size", "16"])


def test_a_report_that_fails_costs_no_checkpoint(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "[/x]run"  # looks like markup
    run.mkdir(parents=True)
    monkeypatch.setattr(SCTDPretrainModule, "export", lambda *args, **options: 1 / 0)
    with pytest.raises(SystemExit):
        pretrain(run, "--trainer.max_steps", "3")
    assert (run / "last.ckpt").is_file() and (run / "report.json").is_file()
    assert json.loads((run / "report.json").read_text())["run"] == str(run)
    assert "SCTDPretrain on text" in capsys.readouterr().out


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(
    tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, max_steps=2).fit(build(SCTDPretrainModule), datamodule=data(method=SCTDPretrainModule))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    config = json.loads(content["tokenizer"]["tokenizer_config.json"])
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, "tokenizer_class": "Tok"}
    content["tokenizer"]["tokenizer_config.json"] = json.dumps(config)
    for files in ({}, {"evil.py": "raise SystemExit(99)"}):
        content["tokenizer"] |= files
        torch.save(content, tmp_path / "evil.ckpt")
        words = ["test", "--ckpt_path", str(tmp_path / "evil.ckpt"), "--data.inputs", corpus()]
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 1
        shown = capsys.readouterr()
        assert "the tokenizer in the checkpoint is damaged" in shown.err and "y/N" not in shown.out + shown.err


def test_a_finished_run_without_its_report_gets_it_again(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    pretrain(run, "--trainer.max_steps", "4")
    before = json.loads((run / "report.json").read_text())
    (run / "report.json").unlink()
    for _ in range(2):
        pretrain(run, "--trainer.max_steps", "4", "--resume", "auto")
        again = json.loads((run / "report.json").read_text())
        assert again["scores"] == before["scores"] != {} and again["steps"] == 4
