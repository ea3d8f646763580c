"""Jobs of several processes, started as on a cluster: nodes over loopback, ranks that die, and what is built once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.cli.launching import check_launcher, check_processes, lost_peer
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import UsageError
from peft_lightning.files.checksum import sum_of
from tests.test_two_ranks import TORCHRUN, assert_as_one_process, finish
from tests.two_ranks_worker import runs

pytestmark = [pytest.mark.xdist_group("nodes"), pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
HEEDED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # as configs/cluster has it
# 12 steps, a checkpoint after every fourth
FEW = ["--trainer.limit_train_batches=12", "--trainer.max_epochs=1", "--save_every_n_steps=4"]


def configs(*names: str) -> list[str]:
    """Words that name configurations."""
    return [word for name in names for word in ("--config", f"configs/{name}.yaml")]


def fit_words(folder: Path, ranks: int, nodes: int, die: tuple[int, int], number: int = signal.SIGKILL) -> list[str]:
    """A fit of the toy run on CPUs, of which one process may die, or get another signal: (rank, step)."""
    words = [*configs("sparse_adapter", "overlays/toy", "overlays/multi_node", "overlays/cpu"), *FEW]
    words += ["--run_dir", str(folder), f"--trainer.devices={ranks // nodes}", f"--trainer.num_nodes={nodes}"]
    words += [
        "--import=tests.nodes_worker",
        "--trainer.callbacks+=tests.nodes_worker.Die",
        f"--trainer.callbacks.rank={die[0]}",
    ]
    words += [f"--trainer.callbacks.step={die[1]}", f"--trainer.callbacks.folder={folder}"]
    return [*words, f"--trainer.callbacks.number={int(number)}"]


def on_one_node(
    folder: Path, *more: str, restarts: int = 0, die: tuple[int, int] = (0, 0), number: int = signal.SIGKILL
) -> Any:
    """The toy run on two processes."""
    start = [*TORCHRUN, "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", HEEDED]
    words = [*start, "-m", "peft_lightning", "fit", *fit_words(folder, 2, 1, die, number), *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=ROOT, env=ENVIRONMENT)


def end_of(folder: Path) -> dict[str, Any]:
    """The last checkpoint, without what a clock said."""
    end: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    end["callbacks"] = {name: state for name, state in end["callbacks"].items() if name == "RunCheckpoint"}
    return end


def assert_same_end(folder: Path, whole: Path, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """A run ended as one that was not interrupted: by default, in the same bits."""
    ends, logs = [end_of(path) for path in (folder, whole)], [MetricsCSV(path).read() for path in (folder, whole)]
    assert ends[0]["global_step"] == 12
    for key in ("state_dict", "optimizer_states", "callbacks"):
        assert_close(ends[0][key], ends[1][key], rtol=rtol, atol=atol)
    for key in ("loops", "lr_schedulers"):
        assert ends[0][key] == ends[1][key]
    numbers = [[{name: float(value) for name, value in row.items()} for row in rows] for rows in logs]
    assert_close(numbers[0], numbers[1], rtol=rtol, atol=atol)


def test_a_process_that_dies_ends_the_job(tmp_path: Path) -> None:
    done = on_one_node(tmp_path / "run", die=(1, 6))
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 60
    assert "Signal 9 (SIGKILL)" in done.stderr and "another process of this job has ended" in done.stderr
    assert end_of(tmp_path / "run")["global_step"] == 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run on two processes leaves that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = on_one_node(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_torchrun_brings_a_job_back_that_ends_as_if_nothing_had_happened(tmp_path: Path, whole: Path) -> None:
    killed = tmp_path / "killed"
    done = on_one_node(killed, restarts=1, die=(0, 6))
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr
    assert_same_end(killed, whole)


def test_processes_that_would_go_on_from_different_checkpoints_refuse(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "0")
    shutil.copytree(whole, tmp_path / "1", ignore=shutil.ignore_patterns("*.ckpt"))
    words = fit_words(Path("RUN"), ranks=2, nodes=1, die=(0, 0))
    command = f"exec {shlex.join([sys.executable, '-m', 'peft_lightning', 'fit', *words, '--resume=changed'])}"
    command = command.replace("RUN", f"{tmp_path}/$RANK")
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c", command],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode != 0
    line = f"process 0 found {tmp_path}/0/last.ckpt (SHA-256 {sum_of(whole / 'last.ckpt')[:12]}), process 1 found none"
    assert line in done.stderr, done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_ends_all_with_what_is_saved(number: int, tmp_path: Path, whole: Path) -> None:
    done = on_one_node(tmp_path / "run", die=(1, 6), number=number)
    assert done.returncode != 0  # torchrun's own, which says those of the processes
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 30
    assert f"stopped by {signal.Signals(number).name} after step 6, all to step 6 is in" in done.stderr, done.stderr
    assert end_of(tmp_path / "run")["global_step"] == 6
    done = on_one_node(tmp_path / "run", die=(1, 6), number=number)  # the same command, which is past that step
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_ends_all_for_good(number: int, tmp_path: Path, whole: Path) -> None:
    """Restarts are for what fails."""
    assert HEEDED in (ROOT / "configs" / "cluster" / "torchrun.sh").read_text()
    options: dict[str, Any] = {"restarts": 2, "die": (1, 6), "number": number}
    done = on_one_node(tmp_path / "run", "--trainer.callbacks.agent=true", **options)
    assert done.returncode != 0
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 30
    assert f"stopped by {signal.Signals(number).name} after step" in done.stderr, done.stderr
    assert 6 <= end_of(tmp_path / "run")["global_step"] < 12
    done = on_one_node(
        tmp_path / "run", "--trainer.callbacks.agent=true", **options
    )  # the same command, past that step
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "run", whole)


def test_restarts_that_would_wait_for_ever_are_refused() -> None:
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(UsageError, match=r"--max-restarts = 3: .*set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_launcher(shared)
    check_launcher({})
    check_launcher({**shared, "TORCHELASTIC_MAX_RESTARTS": "0"})
    check_launcher({**shared, "TORCHELASTIC_USE_AGENT_STORE": "False"})


def test_processes_that_nobody_would_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    common: dict[str, Any] = {"accelerator": "cpu", "logger": False}
    one, local = L.Trainer(**common), L.Trainer(devices=2, strategy="ddp", **common)
    nodes = L.Trainer(num_nodes=2, devices=1, strategy="ddp", **common)
    with pytest.raises(UsageError, match=r"num_nodes = 2: nothing here starts the other nodes; use torchrun"):
        check_processes(nodes, {})
    with pytest.raises(UsageError, match=r"num_nodes = 2: .*or set NODE_RANK, MASTER_ADDR and MASTER_PORT"):
        check_processes(nodes, {"NODE_RANK": "0", "MASTER_ADDR": "a"})
    check_processes(nodes, {"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    with pytest.raises(UsageError, match=r"LOCAL_RANK = 1 .* the 2 processes .*no MASTER_PORT"):
        check_processes(local, {"LOCAL_RANK": "1"})
    check_processes(local, {"LOCAL_RANK": "1", "MASTER_PORT": "1"})
    check_processes(local, {})
    check_processes(one, {"LOCAL_RANK": "0"})
    started = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    for trainer, product in ((one, "1 x 1"), (L.Trainer(devices=4, strategy="ddp", **common), "4 x 1")):
        with pytest.raises(UsageError, match=rf"num_nodes = {product}: torchrun has started 2 processes"):
            check_processes(trainer, started)
    nodes = L.Trainer(num_nodes=2, devices=1, strategy="ddp", **common)
    with pytest.raises(
        UsageError, match=r"devices = 1 on each of trainer.num_nodes = 2: torchrun has started 2 .* this"
    ):
        check_processes(nodes, {**started, "LOCAL_WORLD_SIZE": "2"})
    check_processes(local, {**started, "LOCAL_WORLD_SIZE": "2"})


def test_which_errors_mean_that_another_process_is_gone() -> None:
    assert "--resume auto" in lost_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert not lost_peer(RuntimeError("shapes differ")) and not lost_peer(OSError("Connection closed by peer"))


# -- two nodes of two processes each, over loopback ----------------------------------------------------------------


def a_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_nodes(words: Sequence[str], nodes: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """The same words on every node, with HEAD, NODES and DEVICES in the environment."""
    port = a_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shared = {**ENVIRONMENT, "HEAD": f"127.0.0.1:{port}", "NODES": str(nodes), "DEVICES": "2", "PATH": path}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(words, cwd=ROOT, env={**shared, **environment}, text=True, stdout=pipe, stderr=pipe)
        for _ in range(nodes)
    ]


def ends_of_nodes(started: Sequence[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Exit code and output of each node."""
    try:
        outputs = ["".join(node.communicate(timeout=timeout)) for node in started]
    finally:
        for node in started:
            node.terminate()  # torchrun then ends what it has started
    return [(node.returncode, output) for node, output in zip(started, outputs, strict=True)]


def on_nodes(folder: Path, *, restarts: int = 0, die: tuple[int, int] = (0, 0)) -> list[tuple[int, str]]:
    """The toy run by the script for each node."""
    script = ["bash", "configs/cluster/torchrun.sh", *fit_words(folder, 4, 2, die)]
    return ends_of_nodes(start_nodes(script, RESTARTS=str(restarts)), 450)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and two nodes of two leave of the runs of test_two_ranks."""
    one, folder = (tmp_path_factory.mktemp(name) for name in ("one", "four"))
    finish([sys.executable, "-m", "tests.two_ranks_worker", str(one)])
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{a_port()}", "--nnodes=2", "--nproc-per-node=2"]
    words = [*TORCHRUN, *rendezvous, "-m", "tests.two_ranks_worker", str(folder)]
    for code, output in ends_of_nodes(start_nodes(words), 800):
        assert code == 0, output
    return one, folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", [name for name, *_ in runs()])
def test_two_nodes_as_one_process(name: str, four: tuple[Path, Path]) -> None:
    assert_as_one_process(name, *four, 4)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_process_that_dies_ends_the_job_on_all_nodes(tmp_path: Path) -> None:
    ends = on_nodes(tmp_path / "run", die=(3, 6))
    assert time.time() - float((tmp_path / "run" / "killed").read_text()) < 60
    for code, output in ends:
        assert code != 0 and ("SIGKILL" in output or "another process of this job has ended" in output), output


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("rank", [0, 3])
def test_nodes_come_back_and_end_as_if_nothing_had_happened(rank: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for code, output in on_nodes(whole):
        assert code == 0, output
    for code, output in on_nodes(killed, restarts=2, die=(rank, 6)):
        assert code == 0, output
    assert (killed / "killed").exists()
    # after its first step DDP sums in another order, which matters from three numbers on
    assert_same_end(killed, whole, rtol=1e-4, atol=1e-5)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()} | {"killed"}


@pytest.mark.slow
def test_a_cache_is_built_once_by_all_processes_of_a_file_system(tmp_path: Path) -> None:
    texts = [row["text"] for row in toy_rows("toy_sentiment", "train", size=200)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    finish([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tests.nodes_worker", str(tmp_path)])
    built = [name for rank in (0, 1) for name in (tmp_path / str(rank)).read_text().split()]
    # two splits of either kind of data, and a tokenizer
    assert len(built) == len(set(built)) == 5
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"} == set(built)
