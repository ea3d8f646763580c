"""What it costs to score adapters before the first step, over a forward and backward pass of the same examples."""

from __future__ import annotations

import time

from benchmarks.speed_arms import batches, sparse_module
from peft_lightning import PruneConfig, SparseAdapterModule

__all__ = ["score_seconds"]

_SCORES = ("snip", "grasp")


def score_seconds(tiny: bool, count: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round: ``passes`` over the batches, and what each score takes for all it does.

    Passes and scores see the same batches in the same mode (evaluation, float32), and take turns. A score's time is
    that of ``install_masks``: gradients, ranking, masks. Masks change a module, so each round builds new ones.

    Args:
        tiny: toy task and random encoder.
        count: batches to score on.
        rounds: turns that count, after one that does not.
    """
    seconds: dict[str, list[float]] = {"passes": [], **{f"score_{score}": [] for score in _SCORES}}
    for turn in range(1 + rounds):
        for name in seconds:
            score = name.removeprefix("score_") if name != "passes" else "snip"
            module = sparse_module(tiny, prune=PruneConfig(sparsity=0.4, score=score))
            module.configure_model()
            taken = _passes(module, count) if name == "passes" else _masks(module, count)
            if turn:
                seconds[name].append(taken)
    return seconds


def _passes(module: SparseAdapterModule, count: int) -> float:
    module.eval()
    examples = batches(module, count)
    started = time.perf_counter()
    for batch in examples:
        loss, weight = module.batch_loss(batch)
        (loss / weight).backward()
        module.zero_grad()
    return time.perf_counter() - started


def _masks(module: SparseAdapterModule, count: int) -> float:
    examples = batches(module, count)
    started = time.perf_counter()
    module.install_masks(examples)
    return time.perf_counter() - started
