"""Step times over full fine-tuning's, Lightning's loop over a bare one, and seconds from shell to first step.

The arms take turns, one step each, in one process, so that what slows the machine down slows all of them.
Texts are random tokens of full length: a step costs the same at every turn. The loops read real MRPC batches.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from rich.console import Console

from benchmarks.shared import ROOT, backbone, clean_environment, data_folder
from benchmarks.speed_table import speed_table
from benchmarks.startup import startup_seconds
from peft_lightning import (
    BackboneConfig,
    FineTuneModule,
    OptimConfig,
    PruneConfig,
    SparseAdapterModule,
    TaskDataModule,
)
from peft_lightning.errors import PeftLightningError
from peft_lightning.study.records import RunRecord, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main"]

_CONSOLE = Console(highlight=False, soft_wrap=True)
_ROWS, _TOKENS, _WARM = 32, 64, 3

Module = FineTuneModule | SparseAdapterModule


def _optimizer(module: Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-5, fused=True)


def _step(module: Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> None:
    """Forward, loss, backward, update."""
    loss, weight = module.batch_loss(batch)
    (loss / weight).backward()
    optimizer.step()
    optimizer.zero_grad()


def _adapter(task: str, encoder: BackboneConfig, sparsity: float) -> SparseAdapterModule:
    """Return Houlsby adapters, dense or masked by magnitude (the score does not change a step's cost)."""
    prune = PruneConfig(sparsity=sparsity, score="magnitude")
    module = SparseAdapterModule(task=task, backbone=encoder, prune=prune)
    module.configure_model()
    if sparsity:
        module.install_masks(())
    return module


def _modules(tiny: bool) -> dict[str, Module]:
    """Return every arm, built; a peer is left out where its package is absent."""
    task, encoder = "toy_pairs" if tiny else "mrpc", backbone(tiny)
    full = FineTuneModule(task=task, backbone=encoder)
    full.configure_model()
    arms: dict[str, Module] = {
        "full": full,
        "houlsby": _adapter(task, encoder, 0.0),
        "masks": _adapter(task, encoder, 0.4),
        "bf16": _adapter(task, backbone(tiny, "bfloat16"), 0.0),
    }
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        peer = FineTuneModule(task=task, backbone=encoder)
        peer.configure_model()
        config = LoraConfig(r=8, target_modules=["query", "value"])
        # PEFT freezes the encoder as it wraps it; the head trains, as it does in every arm.
        peer.backbone = get_peft_model(peer.backbone, config)
        arms["peft_lora"] = peer
    return arms


def _time_steps(modules: Mapping[str, Module], steps: int) -> dict[str, list[float]]:
    """Return the seconds of ``steps`` steps of each arm, taken in turn after a few that are not counted."""
    random = torch.Generator().manual_seed(0)
    full: Any = modules["full"].backbone
    ids = torch.randint(5, full.config.vocab_size, (_ROWS, _TOKENS), generator=random)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    batch = {"inputs": inputs, "labels": torch.randint(0, 2, (_ROWS,), generator=random)}
    optimizers = {name: _optimizer(module) for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    names = list(modules)
    for turn in range(_WARM + steps):
        # Who goes first changes from turn to turn: what an arm leaves in the caches is then no arm's advantage.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            module = modules[name]
            started = time.perf_counter()
            _step(module, optimizers[name], batch)
            if turn >= _WARM:
                seconds[name].append(time.perf_counter() - started)
    return seconds


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
        return TaskDataModule(task=task, tokenizer=name, root=root, batch_size=_ROWS, seed=0)

    def bare() -> float:
        module, source = _adapter(task, encoder, 0.0), data()
        source.prepare_data()
        source.setup("fit")
        optimizer = _optimizer(module)
        started = time.perf_counter()
        for batch in islice(source.train_dataloader(), steps):
            _step(module, optimizer, batch)
        return time.perf_counter() - started

    def fit() -> float:
        module = SparseAdapterModule(
            task=task, backbone=encoder, prune=PruneConfig(sparsity=0.0), optim=OptimConfig(lr=1e-5)
        )
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
    steps, rounds = (2, 1) if tiny else (20, 5)
    started = time.perf_counter()
    modules = _modules(tiny)
    identity = modules["full"].backbone_fingerprint
    series = _time_steps(modules, steps)
    del modules
    series |= _time_loops(tiny, steps, rounds)
    series["startup"] = [] if tiny else startup_seconds(backbone(tiny), data_folder())
    return RunRecord(
        name="speed",
        status="finished",
        config={"rows": _ROWS, "tokens": _TOKENS, "steps": steps, "rounds": rounds, "threads": threads},
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
    _CONSOLE.print(text)


if __name__ == "__main__":
    try:
        main()
    except PeftLightningError as error:
        _CONSOLE.print(f"error: {error}")
        sys.exit(error.exit_code)
