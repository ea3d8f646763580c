"""Run by test_two_ranks.py: trains every method on N processes and writes down what each process ends with.

Usage: python -m tests.two_ranks_worker FOLDER RANKS
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from peft_lightning.data.toy import toy_rows
from tests.toy import METHODS, build, data, trainer

# name -> options of module and trainer; the second makes every micro-batch weigh differently
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "weighed": ({"class_weights": [1.0, 4.0]}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
}


def main(folder: Path, ranks: int) -> None:
    """One fit and one test per method and variant, the same global batches whatever the number of ranks."""
    rows = {s: toy_rows("toy_sentiment", s, size=n) for s, n in (("train", 75), ("validation", 21), ("test", 17))}
    for method, (variant, (options, settings)) in product(METHODS, VARIANTS.items()):
        module = build(method, dropout=0.0, optim={"lr": 1e-3, "eps": 1e-4}, **options)
        source = data(batch_size=16 // ranks, rows=rows)
        many: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
        name = f"{method.__name__}-{variant}"
        fit = trainer(folder / name, max_epochs=2, **settings, **many)
        fit.fit(module, datamodule=source)
        tested = fit.test(module, datamodule=source, verbose=False)
        torch.save({"state": module.owned_state(), "test": tested}, folder / f"{name}-{fit.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
