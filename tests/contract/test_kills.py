"""kill -9 anywhere, the same command again, and the run ends in the same bits as one that nobody touched.

The moments are drawn uniformly among those that an undisturbed run counts in each phase (kill_worker.py). What is drawn
follows from ``PEFT_LIGHTNING_KILL_SEED`` (0 unless set), and every message says it. Runs are forked from one process
that has imported all there is to import, so that a kill costs the run alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract import kill_worker
from tests.toy import METHODS, tiny, toy_corpus, toy_sources

pytestmark = pytest.mark.xdist_group("kills")
SEED = int(os.environ.get("PEFT_LIGHTNING_KILL_SEED", "0"))
TENSORS = ("state_dict", "optimizer_states", "best")
PHASES = ("caching", "deciding", "step", "backward", "optimizer", "checkpointing", "validating")


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    """Folders that runs are made from; they must be the same ones before and after a kill."""
    return {"sources": toy_sources(tiny()), "corpus": str(toy_corpus(tuple(kill_worker.SIZES.items())))}


def start(name: str, folder: Path, given: dict[str, Any], ranks: int, kill: str | None, victim: int) -> list[int]:
    """Run to the end, or until one rank is killed, when the others are too, as torchrun does; the exit codes.

    The name is a method's, or METHOD/STRATEGY.
    """
    method, _, strategy = name.partition("/")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contract.kill_worker"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = [
        context.Process(
            target=kill_worker.fit,
            args=(method, folder, given, ranks, rank, port, kill if rank == victim else None, strategy or "ddp"),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 240
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        processes[0].join(0.02)
    return [process.exitcode or 0 for process in processes]


def content(folder: Path) -> dict[str, Any]:
    """All that has to be equal: weights, masks, tables, optimizer, what was decided, and the logged numbers."""
    last, best = (torch.load(folder / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    manifest = last["peft_lightning"]
    return {
        **{key: last[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step")},
        "decided": {key: manifest.get(key) for key in ("plan", "importance", "merged", "adapter")},
        "best": best["state_dict"],
        "log": (folder / "metrics.csv").read_text(),
    }


@pytest.fixture(scope="module")
def whole(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What undisturbed runs end with and count, made when asked for."""
    made: dict[tuple[str, int], tuple[dict[str, Any], dict[str, int]]] = {}

    def ends(name: str, ranks: int) -> tuple[dict[str, Any], dict[str, int]]:
        if (name, ranks) not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            assert start(name, folder, given, ranks, None, 0) == [0] * ranks
            made[name, ranks] = content(folder), json.loads((folder / "moments.json").read_text())
        return made[name, ranks]

    return ends


def killed_and_gone_on(
    name: str, ranks: int, phase: str, whole: Any, given: dict[str, Any], folder: Path, record_property: Any
) -> None:
    """Kill a run at a moment of a phase, start it again, and compare."""
    expected, moments = whole(name, ranks)
    draw = random.Random(f"{SEED} {name} {ranks} {phase}")
    kill, victim = f"{phase}:{draw.randrange(moments[phase])}", draw.randrange(ranks)
    if phase in ("caching", "checkpointing"):
        victim = 0  # the one that writes
    what = f"{name} on {ranks}, kill {kill} of {moments[phase]}, rank {victim}, seed {SEED}"
    codes = start(name, folder, given, ranks, kill, victim)
    assert codes[victim] == -signal.SIGKILL, f"{what}: ended with {codes}"
    assert start(name, folder, given, ranks, None, 0) == [0] * ranks, f"{what}: does not go on"
    found = content(folder)
    for key in TENSORS:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0, msg=f"{what}: other {key}")
    differ = [key for key in expected if key not in TENSORS and found[key] != expected[key]]
    assert not differ, f"{what}: other {differ}"
    record_property("kills", 1)


QUICK = {"SparseAdapterModule": "checkpointing", "PruneLoRAModule": "deciding", "MerAModule": "backward"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(QUICK))
def test_a_killed_run_goes_on(
    name: str, whole: Any, given: dict[str, Any], tmp_path: Path, record_property: Any
) -> None:
    killed_and_gone_on(name, 1, QUICK[name], whole, given, tmp_path / "run", record_property)


@pytest.mark.timeout(600)
def test_a_killed_rank(whole: Any, given: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    killed_and_gone_on("SCTDPretrainModule", 2, "step", whole, given, tmp_path / "run", record_property)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [m.__name__ for m in METHODS])
def test_killed_in_every_phase(
    name: str, ranks: int, phase: str, whole: Any, given: dict[str, Any], tmp_path: Path, record_property: Any
) -> None:
    """84 kills: seven phases, six methods, one process and two."""
    killed_and_gone_on(name, ranks, phase, whole, given, tmp_path / "run", record_property)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", ["backward", "optimizer", "checkpointing", "validating"])
@pytest.mark.parametrize("name", ["FineTuneModule/fsdp2", "SCTDPretrainModule/fsdp2"])
def test_a_killed_run_that_is_sharded(
    name: str, phase: str, whole: Any, given: dict[str, Any], tmp_path: Path, record_property: Any
) -> None:
    """8 kills: what each of two ranks holds a part of."""
    killed_and_gone_on(name, 2, phase, whole, given, tmp_path / "run", record_property)
