"""``--resume``: under the same settings, under others only when told, and from what a disk left undamaged."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from peft_lightning.cli.main import main
from peft_lightning.cli.resuming import FREE
from peft_lightning.files.latest import is_whole
from tests.cli.test_bad_input import FIT, fails

WORDS = [*FIT, "--trainer.enable_progress_bar", "false", "--save_every_n_steps", "1"]


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("resuming") / "run"
    main([*WORDS, "--run_dir", str(folder)])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_aloud(run: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    flip(run / "last.ckpt")
    flip(run / "best.ckpt")
    main([*WORDS, "--run_dir", str(run), "--resume", "auto"])
    said = [line for line in capsys.readouterr().err.splitlines() if " is damaged " in line]
    assert len(said) == 1 and f"the run goes on from the one before, {run / 'previous.ckpt'}" in said[0]
    torch.testing.assert_close(
        torch.load(run / "last.ckpt", weights_only=True)["state_dict"], whole, rtol=0, atol=0, msg="weights"
    )
    assert (run / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    assert is_whole(run / "last.ckpt")


def test_both_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        flip(run / name)
    status, line = fails([*WORDS, "--run_dir", str(run), "--resume", "auto"], capsys)
    assert status == 1 and "both are damaged, there is nothing to go on from" in line


def test_what_differs_is_named_and_taken_when_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--run_dir", str(run), "--trainer.max_steps", "5", "--trainer.gradient_clip_val", "1.0"]
    status, line = fails([*words, "--resume", "auto"], capsys)
    differ = "trainer.gradient_clip_val: None before, 1.0 now; trainer.max_steps: 3 before, 5 now"
    assert status == 2 and differ in line and "--resume changed to go on with these" in line
    assert steps(run / "last.ckpt") == 3
    main([*words, "--resume", "changed"])
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if "goes on with other settings" in line]
    assert len(said) == 1 and differ in said[0]
    assert steps(run / "last.ckpt") == 5
    assert f"goes on after step 3 from {run / 'last.ckpt'}" in err
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 5
    main([*words, "--resume", "auto"])  # these are now the run's


def test_what_the_checkpoint_decides_cannot_be_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, before = [*WORDS, "--run_dir", str(run)], (run / "config.yaml").read_text()
    status, line = fails([*words, "--resume", "changed", "--model.init_args.optim.lr", "0.25"], capsys)
    assert status == 2 and "optim.lr = 0.25, in the checkpoint 0.005: the checkpoint decides this" in line
    assert (run / "config.yaml").read_text() == before
    main([*words, "--resume", "auto"])  # as if nothing had been tried


def test_settings_that_are_not_known_any_more(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").unlink()
    words = [*WORDS, "--run_dir", str(run), "--trainer.max_steps", "4"]
    status, line = fails([*words, "--resume", "auto"], capsys)
    assert status == 2 and "config.yaml is missing, so what they were is not known" in line
    main([*words, "--resume", "changed"])
    assert steps(run / "last.ckpt") == 4 and (run / "config.yaml").exists()


@pytest.mark.parametrize(
    "section",
    [
        {
            "plugins": [
                {"class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": {"precision": "bf16-mixed"}}
            ]
        },
        {"strategy": {"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy"}},
    ],
    ids=["precision", "strategy"],
)
def test_parts_that_may_decide_numbers(
    section: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({"trainer": section}))
    words = [*WORDS, "--config", str(tmp_path / "part.yaml"), "--trainer.precision", "null", "--run_dir", str(run)]
    status, line = fails([*words, "--resume", "auto"], capsys)
    assert status == 2 and f"trainer.{next(iter(section))}" in line


def test_what_may_differ_freely(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    words = ["--data.init_args.workers", "1", "--data.init_args.cache_dir", str(tmp_path / "cache")]
    words += ["--model.init_args.optim.keep_bad_batches", "true"]
    words += ["--save_every_n_steps", "7", "--trainer.strategy", "auto", "--run_dir", str(moved)]
    main([*WORDS, *words, "--resume", "auto"])
    assert not (tmp_path / "run").exists()


def test_the_list_of_what_may_differ_names_options(finished: Path) -> None:
    """A misspelt entry would never match; what another method or data module has is not in this configuration."""
    config: Any = yaml.safe_load((finished / "config.yaml").read_text())
    elsewhere = {"data.init_args.inputs", "model.init_args.importance.file"}
    for name in set(FREE) - elsewhere:
        part = config
        for key in name.split("."):
            assert key in part, name
            part = part[key]


# -- disks that refuse ---------------------------------------------------------------------------------------


def may_mount() -> bool:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    done = subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"], capture_output=True)
    return done.returncode == 0


MOUNTS = pytest.mark.skipif(not may_mount(), reason="a file system of its own needs root and unshare")


def refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    """One line, no traceback, status 1."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("peft-lightning: error: ")]
    assert len(lines) == 1 and all(words in lines[0] for words in said), done.stderr


def test_a_limit_on_file_sizes(run: Path) -> None:
    """As a quota does: the checkpoint of more steps is as large as the one that is there."""
    good = (run / "last.ckpt").read_bytes()
    room = len(good) // 2

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    words = [*WORDS, "--run_dir", str(run), "--trainer.max_steps", "6", "--resume", "changed"]
    line = [sys.executable, "-m", "peft_lightning", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=150, preexec_fn=limit)
    refused(done, "last.ckpt: cannot save the checkpoint", "previous one is unchanged")
    assert (run / "last.ckpt").read_bytes() == good
    assert not list(run.glob(".*.tmp"))
    main(words)
    assert steps(run / "last.ckpt") == 6


@MOUNTS
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_a_disk_that_refuses(disk: str, run: Path, tmp_path: Path) -> None:
    """A small file system that is full, and one that turns read-only, as one with errors does."""
    good = (run / "last.ckpt").read_bytes()
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) + 60_000
    mount = f"mount -t tmpfs -o size={size} tmpfs {run}"
    if disk == "read-only":
        mount = f"mount -t tmpfs tmpfs {run}"
    before = f"cp -a {run} {tmp_path}/copy && {mount} && cp -a {tmp_path}/copy/. {run}/"
    before += f" && mount -o remount,ro {run}" if disk == "read-only" else ""
    words = ["--trainer.max_steps", "6", "--resume", "changed"]
    after = f'"$@"; status=$?; cp {run}/last.ckpt {tmp_path}/left.ckpt; exit $status'
    line = [sys.executable, "-m", "peft_lightning", *WORDS, "--run_dir", str(run), *words]
    shell = ["unshare", "-m", "sh", "-c", f"{before} && {{ {after}; }}", "sh", *line]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=150)
    refused(done, str(run), {"full": "No space left", "read-only": "Read-only file system"}[disk])
    assert (tmp_path / "left.ckpt").read_bytes() == good


@pytest.mark.parametrize("before", [[], ["--resume", "auto"]], ids=["finished", "finished and started again"])
def test_what_is_refused_leaves_everything_as_it_was(
    before: list[str], finished: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what only the data can refuse, when they are read: another number of rows in a step, or other rows."""
    words = [*WORDS, "--run_dir", str(run)]
    if before:
        main([*words, *before])
        assert (run / "last.ckpt").read_bytes() == (finished / "last.ckpt").read_bytes()
    configuration = (run / "config.yaml").read_text()
    more = ["--trainer.max_steps", "5", "--resume", "changed"]
    for changed, message in {
        (
            "--data.init_args.batch_size",
            "16",
        ): "batch_size times ranks is 16; allowed to go on with a run: 8, as before",
        ("--data.init_args.task", "toy_pairs"): "the rows as they are encoded: not the same",
    }.items():
        status, line = fails([*words, *changed, *more], capsys)
        assert status == 2 and message in line
        assert (run / "config.yaml").read_text() == configuration
    main([*words, "--resume", "auto"])
    main([*words, *more])
    assert steps(run / "last.ckpt") == 5


def test_a_run_that_has_no_checkpoint_yet_begins_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*WORDS, "--run_dir", str(tmp_path / "new"), "--resume", "auto"])
    assert f"{tmp_path / 'new'} has no checkpoint yet: the run begins" in capsys.readouterr().err
