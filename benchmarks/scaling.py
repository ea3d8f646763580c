"""How steps per second grow from 1 to 256 devices: on paper for every method, checked on two local processes.

What is on paper is in ``scaling_model``; what is measured, in ``scaling_worker``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.scaling_arms import ARMS, build_arm, load_of
from benchmarks.scaling_model import MACHINES
from benchmarks.scaling_table import scaling_table
from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, clean_environment
from peft_lightning.errors import PeftLightningError
from peft_lightning.study.records import RunRecord, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main"]

_PROCESSES = 2


def _measure(shape: str, tiny: bool, turns: int, rows: int) -> dict[str, Any]:
    """What the worker says, run by torchrun. Raises PeftLightningError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_PROCESSES}", "-m"]
        words += ["benchmarks.scaling_worker", str(file), shape, str(turns), str(rows), *(["--tiny"] if tiny else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeftLightningError(f"torchrun ended with {done.returncode}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def _record(tiny: bool, environment: dict[str, Any]) -> RunRecord:
    paper_shape, shape, turns, rows = "bert-base", "minilm", 2 if tiny else 20, 2 if tiny else 8
    paper_rows = 2 if tiny else 32
    started = time.perf_counter()
    loads = {name: asdict(load_of(build_arm(name, paper_shape, tiny, 1), paper_rows)) for name in ARMS}
    found = _measure(shape, tiny, turns, rows)
    return RunRecord(
        name="scaling",
        status="finished",
        config={
            "loads": loads,
            "machines": {name: asdict(machine) for name, machine in MACHINES.items()},
            "processes": _PROCESSES,
            "paper_shape": "tiny" if tiny else paper_shape,
            "paper_rows": paper_rows,
            "shape": "tiny" if tiny else shape,
            "rows": rows,
            "turns": turns,
            "bytes": found["bytes"],
            "counted": found["counted"],
            "parts": found["parts"],
            "summed_in": found["summed_in"],
        },
        data={"steps": "random tokens"},
        model={"paper": "tiny" if tiny else paper_shape, "measured": "tiny" if tiny else shape},
        seeds={"tokens": 0, "weights": 42},
        environment=environment,
        results=found["results"],
        series=found["series"],
        seconds=time.perf_counter() - started,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure, write the record and the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try it in seconds: small models, no tables")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the record says so")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "scaling"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    record = _record(options.tiny, clean_environment(options.allow_dirty or options.tiny))
    write_record((options.out or default) / "scaling.json", record)
    text = scaling_table(record)
    if not options.tiny and options.out is None:
        write_generated(ROOT / "benchmarks" / "RESULTS.md", "scaling", text)
    CONSOLE.print(text)


if __name__ == "__main__":
    run(main)
