"""Peak memory of each arm of the speed benchmark: ``python -m benchmarks.memory ARM`` prints one arm's bytes.

Each arm has a process of its own, since what one arm frees stays with the process and would hide what the next one
takes. Counted is the peak of the resident set over a few steps, less what the process had when everything was
imported and nothing built: so weights, gradients, the optimiser's averages and activations count, Python and its
libraries do not. ``score_snip`` and ``score_grasp`` are Houlsby adapters while they are scored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.shared import ROOT
from benchmarks.speed_arms import arms, batches, optimizer_of, sparse_module, step
from peft_lightning import PruneConfig
from peft_lightning.errors import PeftLightningError
from peft_lightning.study.memory import peak_bytes, reset_peak

__all__ = ["main", "memory_bytes", "memory_names", "process_bytes"]

_STEPS, _BATCHES = 3, 3


def memory_names(tiny: bool) -> list[str]:
    """Return the arms whose memory is measured; a try-out has two."""
    return ["full", "lora"] if tiny else [*arms(tiny), "score_snip", "score_grasp"]


def memory_bytes(name: str, tiny: bool, threads: int, repeats: int) -> list[float]:
    """Return the bytes of an arm, from as many processes.

    Raises PeftLightningError, with the process's last line, where it fails.
    """
    return process_bytes(["benchmarks.memory", *(["--tiny"] * tiny), "--threads", str(threads), name], repeats)


def process_bytes(words: Sequence[str], repeats: int) -> list[float]:
    """Return the last number that each of so many processes prints.

    Args:
        words: a module and its options, of which the last names what is measured.
        repeats: number of processes.

    Raises PeftLightningError, with the process's last line, where one fails.
    """
    found = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise PeftLightningError(f"the process for {words[-1]} ended with {done.returncode}: {lines[-1]}")
        found.append(float(done.stdout.split()[-1]))
    return found


def _measure(name: str, tiny: bool) -> int:
    """Return the most bytes that the arm holds, from building it on, in this process."""
    reset_peak()
    before = peak_bytes()
    if name.startswith("score_"):
        scored = sparse_module(tiny, prune=PruneConfig(sparsity=0.4, score=name.removeprefix("score_")))
        scored.configure_model()
        examples = batches(scored, _BATCHES)
        reset_peak()  # what loading took for a moment is not the question
        scored.install_masks(examples)
        return peak_bytes() - before
    module = arms(tiny)[name]()
    optimizer, (batch,) = optimizer_of(module), batches(module, 1)
    reset_peak()
    for _ in range(_STEPS):
        step(module, optimizer, batch)
    return peak_bytes() - before


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one arm and write its bytes to the standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("arm", choices=[*arms(tiny=True), "score_snip", "score_grasp"])
    parser.add_argument("--tiny", action="store_true", help="a random encoder")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sys.stdout.write(f"{_measure(options.arm, options.tiny)}\n")


if __name__ == "__main__":
    main()
