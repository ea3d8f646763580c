"""What merging adapters costs: matching by weights over a naive loop, by activations over the forward passes, memory.

``python -m benchmarks.merge --weights`` prints the seconds of merging by weights and of the naive loop, in turn, in a
process of its own. The loop spends most of its time where it gets its temporaries from, and that depends on what the
allocator went through before: so the process is fresh, and there are others whose allocator is told what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.merge_arms import Shape, adapters, naive_loop, own_passes, plain_passes
from benchmarks.merge_table import merge_table
from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, clean_environment
from benchmarks.turns import take_turns
from peft_lightning.errors import PeftLightningError
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import merge_adapters
from peft_lightning.study.records import RunRecord, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main"]

# glibc's allocator: from what size on a block comes from the system, and from what size on free memory goes back to it
_ALLOCATORS = {
    "default": {},  # begins as the next one, and learns from what is freed
    "fresh": {"MALLOC_MMAP_THRESHOLD_": "131072"},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}


def _weights_here(tiny: bool, turns: int) -> dict[str, list[float]]:
    """Seconds of a whole merge by weights with its report, and of the naive loop; the first call of each is left out.

    Raises PeftLightningError where the two do not give the same.
    """
    sources = adapters(Shape.of(tiny))
    naive = naive_loop(sources)
    config = MergeConfig(preset="wts")
    merged, wanted = merge_adapters(None, sources, config), naive()
    for name, tensor in wanted.items():
        difference = float((merged.tensors[name.replace(".sparse.", ".merged.")] - tensor).abs().max())
        if difference > 1e-5:
            raise PeftLightningError(f"{name}: the merge and the naive loop differ by {difference}")
    return take_turns({"wts": lambda: merge_adapters(None, sources, config), "naive": naive}, turns, warm=1)


def _weights(tiny: bool, threads: int, allocator: dict[str, str]) -> dict[str, list[float]]:
    """The same in a fresh process whose allocator has these settings."""
    words = [sys.executable, "-m", "benchmarks.merge", "--weights", "--threads", str(threads), *["--tiny"] * tiny]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment | allocator)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise PeftLightningError(f"the process that merges by weights ended with {done.returncode}: {lines[-1]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _activations(tiny: bool, turns: int) -> dict[str, list[float]]:
    """Seconds of merges by activations beside their forward passes, and bytes of their statistics."""
    shape = Shape.of(tiny)
    tokens = (64, 256) if tiny else (2048, 8192)
    backbone, sources, batches = shape.backbone(), adapters(shape), shape.batches(tokens[0])
    series: dict[str, list[float]] = {}
    for streams, passes in (("own", own_passes(backbone, sources, batches)), ("shared", None)):
        config = MergeConfig(preset="acts", tokens=tokens[0], streams=streams)
        merge_adapters(backbone, sources, MergeConfig(preset="acts", tokens=1, streams=streams), lambda: batches)
        arms: dict[str, Callable[[], object]] = {
            f"acts_{streams}": partial(merge_adapters, backbone, sources, config, lambda: batches),
            f"passes_{streams}": passes or plain_passes(backbone, batches),
        }
        series |= take_turns(arms, turns, warm=0)
    for preset in ("acts", "acts+"):
        for count in tokens:  # one stream of states, or several: the statistics are the same
            config = MergeConfig(preset=preset, tokens=count, streams="shared")
            report = merge_adapters(backbone, sources, config, partial(shape.batches, count)).report
            series[f"bytes/{preset}/{report['tokens']}"] = [float(report["statistics_bytes"])]
    return series


def _measure(tiny: bool, threads: int, environment: dict[str, Any]) -> RunRecord:
    turns, passes = (2, 1) if tiny else (8, 3)
    started = time.perf_counter()
    series: dict[str, list[float]] = {}
    for state, allocator in _ALLOCATORS.items():
        # a process takes seconds to start, so a try-out has one
        found = _weights_here(tiny, turns) if tiny and allocator else _weights(tiny, threads, allocator)
        series |= {f"weights/{state}/{name}": seconds for name, seconds in found.items()}
    CONSOLE.print(f"by weights: {time.perf_counter() - started:.0f} s")
    series |= {f"activations/{name}": values for name, values in _activations(tiny, passes).items()}
    return RunRecord(
        name="merge",
        status="finished",
        config={"shape": asdict(Shape.of(tiny)), "turns": turns, "passes": passes, "threads": threads},
        data={"tokens": "random"},
        model={"model_type": "bert", "weights": "random"},
        seeds={"tokens": 0, "weights": 0},
        environment=environment,
        results={name: median(values) for name, values in series.items()},
        series=series,
        seconds=time.perf_counter() - started,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the record and the table; or print the seconds of merging by weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try it in seconds: small adapters, no table")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the record says so")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--weights", action="store_true", help="merge by weights in this process, and nothing else")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.weights:
        sys.stdout.write(json.dumps(_weights_here(options.tiny, 2 if options.tiny else 8)) + "\n")
        return
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "merge"
    record = _measure(options.tiny, options.threads, clean_environment(options.allow_dirty or options.tiny))
    write_record((options.out or default) / "cpu.json", record)
    text = merge_table(record)
    if not options.tiny:
        write_generated(ROOT / "benchmarks" / "RESULTS.md", "merge", text)
    CONSOLE.print(text)


if __name__ == "__main__":
    run(main)
