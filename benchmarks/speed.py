"""Step times and memory over full fine-tuning's, the cost of scores, Lightning's loop, and seconds to a first step.

The arms take turns, one step each, in one process, so that what slows the machine down slows all of them.
Texts are random tokens of full length: a step costs the same at every turn. The loops read real MRPC batches.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch

from benchmarks.memory import memory_bytes, memory_names
from benchmarks.scoring import score_seconds
from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, backbone, clean_environment, data_folder
from benchmarks.speed_arms import arms, batches, optimizer_of, sparse_module, step
from benchmarks.speed_table import speed_table
from benchmarks.startup import startup_seconds
from benchmarks.turns import take_turns
from peft_lightning import TaskDataModule
from peft_lightning.study.records import RunRecord, write_record
from peft_lightning.study.tables import write_generated
from peft_lightning.task_module import TaskModule

__all__ = ["main"]

_SCORED, _DUEL = 10, 4


def _time_steps(modules: Mapping[str, TaskModule], steps: int) -> dict[str, list[float]]:
    """Return the seconds of ``steps`` steps of each arm, taken in turn after a few that are not counted."""
    (batch,) = batches(next(iter(modules.values())), 1)
    optimizers = {name: optimizer_of(module) for name, module in modules.items()}
    return take_turns({name: partial(step, modules[name], optimizers[name], batch) for name in modules}, steps)


class _Clock(L.Callback):
    """Takes the time from the start of training to its end."""

    seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start."""
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop."""
        self.seconds += time.perf_counter()


def _time_loops(tiny: bool, steps: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds a step, with loading, of a bare loop and of Lightning's fit over the same batches."""
    task, encoder = "toy_pairs" if tiny else "mrpc", backbone(tiny)
    root = None if tiny else str(data_folder())

    def data() -> TaskDataModule:
        name = encoder.tokenizer_name
        return TaskDataModule(task=task, tokenizer=name, root=root, batch_size=32, seed=0)

    def bare() -> float:
        module, source = sparse_module(tiny), data()
        module.configure_model()
        source.prepare_data()
        source.setup("fit")
        optimizer = optimizer_of(module)
        started = time.perf_counter()
        for batch in islice(source.train_dataloader(), steps):
            step(module, optimizer, batch)
        return time.perf_counter() - started

    def fit() -> float:
        module = sparse_module(tiny)
        clock = _Clock()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(module, datamodule=data())
        return clock.seconds

    loops: dict[str, Callable[[], float]] = {"bare_loop": bare, "lightning_fit": fit}
    for loop in loops.values():
        loop()
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds[name].append(loop() / steps)
    return seconds


def _measure(tiny: bool, threads: int, environment: dict[str, Any]) -> RunRecord:
    steps, rounds, repeats = (2, 1, 1) if tiny else (20, 5, 3)
    scored = 2 if tiny else _SCORED
    started = time.perf_counter()
    modules = {name: build() for name, build in arms(tiny).items()}
    identity, (example,) = modules["full"].backbone_fingerprint, batches(modules["full"], 1)
    series = _time_steps(modules, steps)
    # two that are close need more turns to be told apart
    pair: dict[str, TaskModule] = {name: modules[name] for name in ("lora", "peft_lora") if name in modules}
    series |= {f"duel/{name}": seconds for name, seconds in _time_steps(pair, _DUEL * steps).items()}
    del modules, pair
    series |= _time_loops(tiny, steps, rounds)
    series |= score_seconds(tiny, scored, rounds)
    for name in memory_names(tiny):
        series[f"memory/{name}"] = memory_bytes(name, tiny, threads, repeats)
    series["startup"] = [] if tiny else startup_seconds(backbone(tiny), data_folder())
    return RunRecord(
        name="speed",
        status="finished",
        config={
            "rows": len(example["labels"]),
            "tokens": example["inputs"]["input_ids"].shape[1],
            "steps": steps,
            "rounds": rounds,
            "scored_batches": scored,
            "memory_repeats": repeats,
            "threads": threads,
        },
        data={"steps": "random tokens", "loops": "toy_pairs" if tiny else "mrpc"},
        model=identity,
        seeds={"tokens": 0, "data": 0},
        environment=environment,
        results={name: median(values) for name, values in series.items() if values},
        series=series,
        seconds=time.perf_counter() - started,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the record and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try it in seconds: toy data, random encoder, no table")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the record says so")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "speed"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    environment = clean_environment(options.allow_dirty or options.tiny)
    record = _measure(options.tiny, options.threads, environment)
    write_record((options.out or default) / "speed.json", record)
    text = speed_table(record)
    if not options.tiny:
        write_generated(ROOT / "benchmarks" / "RESULTS.md", "speed", text)
    CONSOLE.print(text)


if __name__ == "__main__":
    run(main)
