"""The scripts in configs/cluster: what they start, and when a job is put back into SLURM's queue."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SLURM, TORCHRUN = (ROOT / "configs" / "cluster" / f"{name}.sh" for name in ("slurm", "torchrun"))
OVERLAYS = {SLURM: "slurm", TORCHRUN: "multi_node"}


def overlay(name: str) -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "configs" / "overlays" / f"{name}.yaml").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("script", OVERLAYS, ids=lambda path: path.stem)
def test_what_a_script_starts(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    text = script.read_text()
    files = re.findall(r"configs/[\w/]+\.(?:yaml|sh)", text)
    assert f"configs/overlays/{OVERLAYS[script]}.yaml" in files
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_slurm_and_its_overlay_agree() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", SLURM.read_text(), re.MULTILINE))
    trainer = overlay("slurm")["trainer"]
    assert int(options["nodes"]) == trainer["num_nodes"]
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"]) == trainer["devices"]
    assert "requeue" in options


def test_jobs_of_clusters_go_on_by_themselves() -> None:
    for name in ("slurm", "multi_node", "pretrain_nodes"):
        assert overlay(name)["resume"] == "auto"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "multi_node", "slurm"])
def test_machines_with_gpus_compute_in_bfloat16(name: str) -> None:
    assert overlay(name)["trainer"]["precision"] == "bf16-mixed"


def job(tmp_path: Path, step: str, script: Path = SLURM) -> subprocess.Popen[bytes]:
    """The script of a job, in which srun is a shell script with these lines, and scontrol writes its words down."""
    commands = {
        "srun": step.replace("STARTED", f'echo "$@" > {tmp_path}/started'),
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    started = subprocess.Popen(["bash", str(script), "--run_dir", "a b"], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return started


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_ends_by_itself_does_not_come_back(code: int, tmp_path: Path) -> None:
    assert job(tmp_path, f"STARTED\nexit {code}").wait(30) == code
    words = (tmp_path / "started").read_text().split()
    assert words[-3:] == ["--run_dir", "a", "b"] and "--kill-on-bad-exit=1" in words
    assert not (tmp_path / "requeued").exists()


SAVES = "trap 'sleep 0.3; exit {code}' USR1\nSTARTED\nfor turn in $(seq 300); do sleep 0.1; done"


@pytest.mark.parametrize(("code", "back"), [(138, True), (143, True), (0, False)])
def test_a_job_whose_time_is_over_comes_back_unless_it_was_done(code: int, back: bool, tmp_path: Path) -> None:
    """One that was told to end may also end by what srun sends to those that end last (143)."""
    started = job(tmp_path, SAVES.format(code=code))
    started.send_signal(signal.SIGUSR1)
    assert started.wait(30) == code
    assert (tmp_path / "requeued").exists() == back
    if back:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_a_signal_before_the_step_has_a_number_reaches_it(tmp_path: Path) -> None:
    """The signal comes between the start of srun and the line after it, which notes its number."""
    noted = "step=$!\n"
    before, after = SLURM.read_text().split(noted)
    script = tmp_path / "script.sh"
    wait = f"while [ ! -e {tmp_path}/started ]; do sleep 0.05; done\nkill -USR1 $$\n"
    script.write_text(before + wait + noted + after)
    assert job(tmp_path, SAVES.format(code=138), script).wait(30) == 138
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
