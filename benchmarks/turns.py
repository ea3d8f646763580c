"""Timings that are fair to every arm: one step each in turn, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["take_turns"]


def take_turns(
    arms: Mapping[str, Callable[[], object]], turns: int, *, warm: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of ``turns`` calls of each arm, so that what slows the machine down slows all of them.

    Args:
        arms: name -> one step.
        turns: calls that count, after ``warm`` that do not (and may compile).
        warm: these.
        device: where it is not cpu, it is waited for before and after each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(warm + turns):
        # Who goes first changes from turn to turn: what an arm leaves in the caches is then no arm's advantage.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if device != "cpu":
                torch.accelerator.synchronize()
            started = time.perf_counter()
            arms[name]()
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds
