"""One JSON file per run: what was run, on what, where, and what came out.

A number without this context is not evidence, so a record holds the effective configuration, the identity of
data and model, the versions, the commit and whether the tree had changes, the device, the seeds, the metric
series, the memory and the time. Only plain JSON types go in, and NaN does not.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import DataError, UsageError
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_bytes

__all__ = ["RunRecord", "environment", "read_record", "write_record"]

_PACKAGES = ("torch", "lightning", "transformers", "datasets", "tokenizers", "torchmetrics", "numpy")
# Files that a benchmark itself writes do not make its tree dirty.
_OUTPUTS = ("benchmarks/results", "benchmarks/RESULTS.md", "README.md")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run, finished or failed.

    ``results`` holds the final numbers, ``series`` a list per metric with one entry an epoch or step,
    ``environment`` what ``environment()`` returned.
    """

    name: str
    status: str
    config: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    seeds: dict[str, int]
    environment: dict[str, Any]
    results: dict[str, float]
    series: dict[str, list[float]] = field(default_factory=dict)
    memory_bytes: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.status not in ("finished", "failed"):
            raise UsageError(f"status is {self.status!r}: it must be 'finished' or 'failed'")


def environment() -> dict[str, Any]:
    """Return the versions, the commit of the source tree, its dirty flag and the device, as plain values."""
    import torch

    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD")
    excluded = [f":(exclude){path}" for path in _OUTPUTS]
    status = _git(root, "status", "--porcelain", "--", ".", *excluded)
    cuda = torch.cuda.is_available()
    return {
        "commit": commit or None,
        "dirty": bool(status) or not commit,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "device": {
            "kind": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else _processor(),
            "threads": torch.get_num_threads(),
        },
    }


def write_record(path: str | Path, record: RunRecord) -> Path:
    """Write ``record`` as JSON, in one step, and return its path.

    Raises DataError, and leaves an older file as it was, where the record holds NaN, infinity or a value that
    JSON has no form for.
    """
    path = Path(path)
    try:
        text = json.dumps(_plain(asdict(record)), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: the record {record.name!r} cannot be written as JSON: {error}") from error
    atomic_write(path, lambda file: file.write(f"{text}\n".encode()))
    return path


def read_record(path: str | Path) -> RunRecord:
    """Return the record in a JSON file. Raises DataError, with the path, where it holds none."""
    try:
        return RunRecord(**parse_json(read_bytes(Path(path))))
    except (OSError, TypeError, ValueError) as error:
        known = [entry.name for entry in fields(RunRecord)]
        raise DataError(f"{path} holds no run record with the fields {known}: {error}") from error


def _plain(value: Any) -> Any:
    """Return ``value`` with tuples as lists and numbers of numpy or torch as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item") and not isinstance(value, bool | int | float | str):
        return value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    return value


def _git(root: Path, *arguments: str) -> str:
    """Return the output of a git command in ``root``, empty where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
