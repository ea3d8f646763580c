"""Accuracy on MRPC: full fine-tuning, dense Houlsby adapters, and these with 40 % removed by SNIP.

Every run writes one JSON file, and a run whose file is there is not repeated, so an interrupted benchmark
goes on where it stopped. All arms share a seed's order of data; the adapters' frozen backbone is held in
bfloat16. The number of an arm is the validation metric after its last epoch: no epoch is chosen by looking.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.mrpc_table import write_tables
from benchmarks.runs import Run, Trial, run_missing
from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, backbone, clean_environment
from peft_lightning import FineTuneModule, OptimConfig, PruneConfig, SparseAdapterModule

__all__ = ["ARMS", "Arm", "main"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One column of the comparison; ``sparsity`` None means full fine-tuning."""

    name: str
    sparsity: float | None
    lr: float
    epochs: int
    dtype: str
    seeds: tuple[int, ...] = (0, 1, 2)

    def settings(self) -> dict[str, Any]:
        """Return what a run of this arm is made of, for its record."""
        return {name: value for name, value in asdict(self).items() if name != "seeds"}

    def module(self, seed: int, tiny: bool) -> FineTuneModule | SparseAdapterModule:
        """Return the untrained module of a seed."""
        task = "toy_pairs" if tiny else "mrpc"
        encoder, optim = backbone(tiny, self.dtype), OptimConfig(lr=self.lr)
        if self.sparsity is None:
            return FineTuneModule(task=task, backbone=encoder, optim=optim, seed=seed)
        prune = PruneConfig(sparsity=self.sparsity, score="snip")
        return SparseAdapterModule(task=task, backbone=encoder, prune=prune, optim=optim, seed=seed)


ARMS = (
    Arm(name="full", sparsity=None, lr=1e-4, epochs=3, dtype="float32"),
    Arm(name="houlsby", sparsity=0.0, lr=1e-3, epochs=5, dtype="bfloat16"),
    # Against "houlsby": what holding the frozen backbone in bfloat16 does to the metric. A third seed would take the
    # whole past 45 minutes.
    Arm(name="houlsby32", sparsity=0.0, lr=1e-3, epochs=5, dtype="float32", seeds=(0, 1)),
    Arm(name="snip40", sparsity=0.4, lr=1e-3, epochs=5, dtype="bfloat16"),
)


def _runs(tiny: bool) -> list[Run]:
    """Seed by seed over all arms, so that an early stop leaves whole seeds."""
    turns = [(seed, arm) for seed in (0, 1, 2) for arm in ARMS if seed in arm.seeds[: 2 if tiny else None]]
    return [_run(arm, seed, tiny) for seed, arm in turns]


def _run(arm: Arm, seed: int, tiny: bool) -> Run:
    trial = Trial(epochs=1 if tiny else arm.epochs)
    chosen = {"seed": seed, "epochs": trial.epochs, "batch_size": trial.batch_size, "tiny": tiny}
    return Run(
        name=f"{arm.name}-seed{seed}",
        settings=arm.settings() | chosen,
        seed=seed,
        build=lambda: arm.module(seed, tiny),
        trial=trial,
        toy=tiny,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mrpc", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try it in a minute: toy data, random encoder, no tables")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the records say so")
    parser.add_argument("--out", type=Path, help="folder of the records")
    options = parser.parse_args(arguments)
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "mrpc"
    folder: Path = options.out or default
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = clean_environment(options.allow_dirty or options.tiny)
    run_missing(_runs(options.tiny), folder, environment, CONSOLE)
    CONSOLE.print(write_tables(folder, [arm.name for arm in ARMS], () if options.tiny else ("README", "RESULTS")))


if __name__ == "__main__":
    run(main)
