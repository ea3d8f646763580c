"""Run by test_kinds.py: trains one method on the toy task of every kind, on N processes, and writes down the ends.

Usage: python -m tests.contract.kinds_worker FOLDER RANKS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from peft_lightning.methods import SparseAdapterModule
from tests.contract.kinds import TOYS, data_of, module_of, rows_of
from tests.toy import trainer

# Batches of 16: two and a short one in training, of which the ranks have 6 and 5 rows; in validation a rank has none.
SIZES = {"train": 43, "validation": 17, "test": 1}


def main(folder: Path, ranks: int) -> None:
    """Two epochs of every kind, the same global batches whatever the number of ranks."""
    for kind in TOYS:
        # two processes add numbers up in another order: a large epsilon keeps Adam from making much of it
        module = module_of(kind, SparseAdapterModule, optim={"lr": 1e-3, "eps": 1e-3})
        source = data_of(kind, rows_of(kind, SIZES), batch_size=16 // ranks, eval_batch_size=16 // ranks)
        many: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
        fit = trainer(max_epochs=2, **many)
        fit.fit(module, datamodule=source)
        scores = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val/")}
        end = {"state": module.owned_state(), "scores": scores, "steps": fit.global_step}
        torch.save(end, folder / f"{kind}-{ranks}-{fit.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
