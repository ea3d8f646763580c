"""Random states that depend on numbers, and on nothing that happened before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["seeded_on_cpu", "step_seed"]


def step_seed(*parts: int) -> int:
    """A 63-bit seed from integers, such as (seed, epoch, batch, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded_on_cpu(seed: int) -> Iterator[None]:
    """Make modules on the CPU and in float32, whatever the Trainer prefers; the random state comes back afterwards.

    Random numbers, and so initial values, differ between devices and dtypes, and a file must fit everywhere.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(default)
