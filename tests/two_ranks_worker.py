"""Run by test_two_ranks.py: trains every method on N processes and writes down what each process ends with.

Usage: python -m tests.two_ranks_worker FOLDER RANKS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from peft_lightning.data.toy import toy_rows
from tests.toy import METHODS, build, data, trainer


def main(folder: Path, ranks: int) -> None:
    """One fit and one test per method, the same global batches whatever the number of ranks."""
    rows = {s: toy_rows("toy_sentiment", s, size=n) for s, n in (("train", 75), ("validation", 21), ("test", 17))}
    for method in METHODS:
        for precision in ("32-true",):
            module = build(method, dropout=0.0, optim={"lr": 1e-3, "eps": 1e-4})
            source = data(batch_size=16 // ranks, rows=rows)
            options: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
            fit = trainer(folder / f"{method.__name__}", max_epochs=2, precision=precision, **options)
            fit.fit(module, datamodule=source)
            tested = fit.test(module, datamodule=source, verbose=False)
            torch.save(
                {"state": module.owned_state(), "test": tested, "writes": fit.is_global_zero},
                folder / f"{method.__name__}-{fit.global_rank}.pt",
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
