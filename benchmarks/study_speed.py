"""Runs per minute of a study: a process for each run, one by one in a process, and side by side; arms in turn.

Few-shot runs of a Pfeiffer adapter (width 48, 10 epochs over 10 shots per class of SST-2 in batches of 8, tested on 500
rows), 4 rates on each of 2 splits. The process of a run is that of a study of one cell, with the data tokenised before:
less than ``fit`` and ``test`` take. What is read once (backbone, rows) is in the time of every arm; several processes
read it each, which the larger grid (ten splits) has the time for.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, backbone, clean_environment, data_folder
from benchmarks.turns import take_turns
from peft_lightning.errors import UsageError
from peft_lightning.study.grid import merged_settings, read_grid
from peft_lightning.study.records import RunRecord, write_record
from peft_lightning.study.runner import run_study
from peft_lightning.study.tables import markdown_table, write_generated

__all__ = ["main", "speed_table"]

_GOALS = {"process": 2.0, "loop": 1.2}
_TITLES = {
    "process": "a process for each run",
    "loop": "one by one",
    "together": "side by side",
    "long": "side by side, a larger grid",
    "workers": "the larger grid in a process for each thread",
}
_SEEDS = (13, 21, 42, 87, 100, 1, 2, 3, 4, 5)
"""Of the larger grid, in which the start of further processes weighs less."""


def _grid(tiny: bool, device: str) -> dict[str, Any]:
    """The grid of all arms."""
    adapter = {"kind": "pfeiffer", "bottleneck": 8 if tiny else 48}
    grid: dict[str, Any] = {
        "backbone": asdict(backbone(tiny, "bfloat16")),
        "data": {"shots": [10], "test_rows": 50 if tiny else 500, "max_length": 128},
        "tasks": ["toy_sentiment" if tiny else "sst2"],
        "seeds": [13] if tiny else [13, 21],
        "lr": [5e-4, 1e-3] if tiny else [5e-4, 1e-3, 2e-3, 3e-3],
        "epochs": [2 if tiny else 10],
        "methods": {
            "adapter": {
                "class_path": "SparseAdapterModule",
                "init_args": {"adapter": adapter, "prune": {"sparsity": 0.0}},
            }
        },
        "device": device,
    }
    return grid


class _Arms:
    """The ways, each a call that does some runs from nothing but the cache of tokens.

    Args:
        grid: of all runs.
        scratch: a folder.
        processes: runs of the first arm, each in a process of its own.
        threads: of torch.
    """

    def __init__(self, grid: dict[str, Any], scratch: Path, processes: int, threads: int) -> None:
        self.grid, self.scratch, self.processes, self.threads = grid, scratch, processes, threads
        self.number = 0
        self.larger = {**grid, "seeds": [*_SEEDS[: 5 * len(grid["seeds"])]]}
        few, many = (len(each["seeds"]) * len(each["lr"]) for each in (grid, self.larger))
        self.runs = {"process": processes, "loop": few, "together": few, "long": many, "workers": many}
        self.scores: dict[str, list[float]] = {}

    def calls(self) -> dict[str, Callable[[], object]]:
        """Return name -> call."""
        return {
            "process": self._apart,
            "loop": partial(self._here, "loop", self.grid, side_by_side=1),
            "together": partial(self._here, "together", self.grid, side_by_side=8),
            "long": partial(self._here, "long", self.larger, side_by_side=8),
            "workers": partial(self._here, "workers", self.larger, side_by_side=4, workers=self.threads),
        }

    def _apart(self) -> None:
        for number in range(self.processes):
            one = {"seeds": self.grid["seeds"][:1], "lr": [self.grid["lr"][number % len(self.grid["lr"])]]}
            config = self.scratch / "one.yaml"
            config.write_text(json.dumps({**self.grid, **one}), encoding="utf-8")  # JSON is YAML
            words = ["study", "--config", str(config), "--output", str(self._folder())]
            start = f"import torch; torch.set_num_threads({self.threads}); from peft_lightning.cli.main import main; "
            done = subprocess.run(
                [sys.executable, "-c", f"{start}main({words!r})"], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise UsageError(f"a run failed: {done.stderr.strip().splitlines()[-1]}")

    def _here(self, name: str, grid: dict[str, Any], **options: int) -> None:
        with redirect_stderr(StringIO()):
            records = run_study(read_grid({**grid, **options}), self._folder())
        if failed := [record["error"] for record in records if "error" in record]:
            raise UsageError(f"a run failed: {failed[0]}")
        self.scores[name] = [record["test"]["accuracy"] for record in records]

    def _folder(self) -> Path:
        self.number += 1
        return self.scratch / str(self.number)


def _measure(tiny: bool, threads: int, turns: int, device: str, environment: dict[str, Any]) -> RunRecord:
    started = time.perf_counter()
    grid = _grid(tiny, device)
    model = {**grid["backbone"], "name": Path(grid["backbone"]["name"]).name if grid["backbone"]["name"] else None}
    with tempfile.TemporaryDirectory() as folder:
        # the record says neither where the data lie nor where the encoder does: that is this machine's
        placed = grid if tiny else merged_settings(grid, {"data": {"root": str(data_folder())}})
        arms = _Arms(placed, Path(folder), 1 if tiny else 2, threads)
        seconds = take_turns(arms.calls(), turns, warm=0 if tiny else 1, device=device)
    series = {name: [60 * arms.runs[name] / value for value in values] for name, values in seconds.items()}
    accuracy = {f"accuracy/{name}": sum(values) / len(values) for name, values in arms.scores.items()}
    return RunRecord(
        name="study_speed",
        status="finished",
        config={"grid": {**grid, "backbone": model}, "threads": threads, "turns": turns, "runs": arms.runs},
        data={"task": grid["tasks"][0], **grid["data"]},
        model=model,
        seeds={"first": grid["seeds"][0]},
        environment=environment,
        results={**{name: median(values) for name, values in series.items()}, **accuracy},
        series=series,
        seconds=time.perf_counter() - started,
    )


def speed_table(record: RunRecord) -> str:
    """Return the runs per minute of each arm, the median over turns of what side by side gains on it, and where."""
    rows: list[Mapping[str, object]] = []
    for name, title in _TITLES.items():
        pairs = zip(record.series["together"], record.series[name], strict=True)
        gain = median(one / other for one, other in pairs)
        goal = f"at least {_GOALS[name]:g}" if name in _GOALS else ""
        rows.append(
            {
                "runs": title,
                "runs per minute": f"{record.results[name]:.1f}",
                "side by side is faster by": f"{gain:.2f}" if goal else "",
                "goal": goal,
            }
        )
    device, versions = record.environment["device"], record.environment["versions"]
    runs, turns = record.config["runs"], len(record.series["loop"])
    changed = " with changes" if record.environment["dirty"] else ""
    return (
        f"{markdown_table(rows)}\n\nMedians of {turns} turns of {runs['loop']} runs, a process each for "
        f"{runs['process']} of them, the larger grid {runs['long']}; ratios turn by turn. "
        f"{device['name']}, {device['threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; commit {str(record.environment['commit'])[:12]}{changed}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the record and the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tiny", action="store_true", help="try it in seconds: toy data, random encoder")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the record says so")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of all arms (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "study_speed"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    torch.set_num_threads(options.threads)
    environment = clean_environment(options.allow_dirty or options.tiny)
    record = _measure(options.tiny, options.threads, 1 if options.tiny else options.turns, options.device, environment)
    write_record((options.out or default) / f"study_speed_{options.device}.json", record)
    text = speed_table(record)
    if not options.tiny and options.out is None:
        write_generated(ROOT / "benchmarks" / "RESULTS.md", f"study-{options.device}", text)
    CONSOLE.print(text)


if __name__ == "__main__":
    run(main)
