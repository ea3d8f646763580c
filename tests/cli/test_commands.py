"""The four commands as a user runs them, in processes of their own, and what they leave behind."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import peft_lightning.methods as methods
from peft_lightning import load
from peft_lightning.cli.main import main

pytestmark = pytest.mark.xdist_group("commands")
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    "--config", str(ROOT / "configs/sparse_adapter.yaml"),
    "--config", str(ROOT / "configs/overlays/toy.yaml"),
    "--config", str(ROOT / "configs/overlays/cpu.yaml"),
]  # fmt: skip
ADVERTISEMENTS = ("Tip:", "litlogger", "GPU available", "Seed set", "warn", "Warn", "deprecated")


def command(*words: str, status: int = 0, **options: Any) -> str:
    """Run ``peft-lightning`` and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "peft_lightning", *words],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder and what it printed."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    words = [
        "fit",
        *CONFIGS,
        "--run_dir",
        str(folder),
        "--trainer.max_epochs",
        "1",
        "--save_every_n_steps",
        "20",
    ]
    return folder, command(*words)


def test_fit_leaves_what_it_promises_and_prints_a_table(run: tuple[Path, str]) -> None:
    folder, printed = run
    names = {p.name for p in folder.iterdir()}
    assert {
        "config.yaml",
        "metrics.csv",
        "best.ckpt",
        "last.ckpt",
        "adapter",
        "report.json",
        "tensorboard",
    } <= names
    for word in (
        "SparseAdapter",
        "trained parameters",
        "kept share",
        "majority class",
        "seconds",
        str(folder)[:20],
    ):
        assert word in printed, printed
    assert not [word for word in ADVERTISEMENTS if word in printed], printed
    report = json.loads((folder / "report.json").read_text())
    assert report["kept_share"] == pytest.approx(0.6, abs=1e-4)
    assert report["scores"].keys() == {"accuracy", "loss"} and "accuracy" in report["majority"]
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row.get("val/accuracy")] == ["64"]
    sizes = {name: (folder / name).stat().st_size for name in ("best.ckpt", "last.ckpt")}
    assert all(size < 700_000 for size in sizes.values()), sizes  # the backbone alone would be 400 KB more
    assert (folder / "config.yaml").read_text().count("class_path") >= 2


def test_the_effective_configuration_starts_the_same_run(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(tmp_path / "again")])
    for name in ("best.ckpt", "last.ckpt"):
        one, two = (torch.load(f / name, weights_only=True)["state_dict"] for f in (folder, tmp_path / "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_test_validate_and_predict_need_the_checkpoint_only(run: tuple[Path, str]) -> None:
    folder, _ = run
    checkpoint = str(folder / "best.ckpt")
    printed = command("test", "--ckpt_path", checkpoint)
    assert "test accuracy" in printed and "majority class" in printed
    assert not [word for word in ADVERTISEMENTS if word in printed], printed
    main(["validate", "--ckpt_path", checkpoint])
    fit, again = (json.loads((folder / name).read_text())["scores"] for name in ("report.json", "validate.json"))
    assert again["accuracy"] == fit["accuracy"]
    main(["predict", "--ckpt_path", checkpoint])
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(256))
    for line in lines:
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


def test_load_and_predict_from_python(run: tuple[Path, str]) -> None:
    folder, _ = run
    texts = ["the cat is good", "this dog is not kind"]
    answers = [load(folder / part).predict(texts) for part in (".", "best.ckpt", "last.ckpt")]
    assert answers[0] == answers[1]
    assert load(folder / "adapter").predict(texts) == answers[2]
    for answer in answers[0]:
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
        assert set(answer["probabilities"]) == {"negative", "positive"}


def printed_by(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that only prints prints, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert not caught.value.code
    return capsys.readouterr().out


def test_help_of_the_tools_loads_no_framework() -> None:
    """It would take seconds."""
    tools = ("export", "import", "merge", "probe", "study", "importance")
    code = f"""
import sys
from peft_lightning.cli.main import main
for tool in {tools!r}:
    try:
        main([tool, "--help"])
    except SystemExit as end:
        assert not end.code
assert not {{"torch", "lightning", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(tools), done.stderr


def test_help_and_print_config_for_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit" in printed_by(["--help"], capsys)
    assert "peft-lightning 0" in printed_by(["--version"], capsys)
    assert "--model.help" in printed_by(["fit", "--help"], capsys)
    for kind in methods.__all__:
        printed = printed_by(["fit", f"--model.help={kind}"], capsys)
        assert "backbone" in printed and "optim" in printed and "learning rate" in printed
    assert "batch_size" in printed_by(["fit", "--data.help=TaskDataModule"], capsys)
    words = ["fit", *CONFIGS, "--model.init_args.prune.sparsity", "0.25", "--print_config"]
    config = yaml.safe_load(printed_by(words, capsys))
    assert config["model"]["init_args"]["prune"]["sparsity"] == 0.25
    assert config["model"]["init_args"]["adapter"]["bottleneck"] == 64


def test_no_words_print_the_usage_and_fail() -> None:
    assert "usage" in command(status=2)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "peft_lightning", "fit", *CONFIGS, "--run_dir", str(folder), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    """Until the log holds that many steps."""
    log = folder / "metrics.csv"
    deadline = time.monotonic() + 90
    while not log.exists() or log.read_text().count("\n") <= steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(number: signal.Signals, tmp_path: Path) -> None:
    settings = {"max_epochs": 3, "accumulate_grad_batches": 3, "log_every_n_steps": 1, "val_check_interval": 30}
    words = [word for name, value in settings.items() for word in (f"--trainer.{name}", str(value))]
    words += ["--save_every_n_steps", "5", "--data.init_args.batch_size", "8"]
    command("fit", *CONFIGS, "--run_dir", str(tmp_path / "whole"), *words)
    for steps in (12, 100) if number == signal.SIGTERM else (60,):
        process = start(tmp_path / "parts", *words, "--resume", "auto")
        wait_for_steps(process, tmp_path / "parts", steps)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    command("fit", *CONFIGS, "--run_dir", str(tmp_path / "parts"), *words, "--resume", "auto")
    whole, parts = (torch.load(tmp_path / p / "last.ckpt", weights_only=True) for p in ("whole", "parts"))
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(parts["optimizer_states"], whole["optimizer_states"], rtol=0, atol=0)
    logs = [(tmp_path / p / "metrics.csv").read_text() for p in ("whole", "parts")]
    assert logs[0] == logs[1]
    best = [torch.load(tmp_path / p / "best.ckpt", weights_only=True)["state_dict"] for p in ("whole", "parts")]
    torch.testing.assert_close(best[1], best[0], rtol=0, atol=0)


def test_sigterm_saves_the_step_that_was_running(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--trainer.log_every_n_steps", "1", "--save_every_n_steps", "100000",
                    "--trainer.max_epochs", "30", "--trainer.limit_val_batches", "0")  # fmt: skip
    wait_for_steps(process, tmp_path / "run", 40)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    content = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    rows = (tmp_path / "run" / "metrics.csv").read_text().count("\n") - 1
    assert content["global_step"] == rows >= 40
