"""One of several local processes of the scaling benchmark; the first one writes what was measured.

Usage: torchrun --standalone --nproc-per-node=2 -m benchmarks.scaling_worker FILE SHAPE TURNS ROWS [--tiny]

Each turn an arm takes four steps: alone, while the other processes wait; all at once, each for itself; all at once with
the gradients summed; and the sum of as many bytes without a step. So that what slows the machine down slows all four.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling_arms import ARMS, Arm, build_arm, load_of
from peft_lightning.sharding import shard

__all__ = ["measure"]

_WARM = 2


class _Step(nn.Module):
    """A forward pass is the loss of an arm, as DDP wants it."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.module = arm.module
        self._loss = (arm.loss,)

    def forward(self) -> torch.Tensor:
        return self._loss[0]()


def _ways(name: str, shape: str, tiny: bool, rows: int, sent: list[int]) -> dict[str, Callable[[], None]]:
    """The steps of an arm by name; ``sent`` gets the bytes of each bucket that DDP sums."""
    alone, arm = (build_arm(name, shape, tiny, rows) for _ in range(2))
    size, run = sum(p.numel() * p.element_size() for p in alone.module.trainable_parameters().values()), arm.loss
    if arm.sharded:
        whole = shard(arm.module, init_device_mesh("cpu", (dist.get_world_size(),)))

        def run() -> torch.Tensor:
            return whole(arm.loss)
    else:
        wrapped: Any = DistributedDataParallel(_Step(arm), broadcast_buffers=False)

        # a lambda: torch compares annotations, which are text here, with its own types
        wrapped.register_comm_hook(None, lambda state, bucket: allreduce_hook(state, note(bucket)))
        run = wrapped
    gradients = torch.zeros(size // 4)

    def note(bucket: Any) -> Any:
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return bucket

    def step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizers = [torch.optim.AdamW(each.module.trainable_parameters().values(), lr=1e-5) for each in (alone, arm)]

    def by_itself() -> None:
        if dist.get_rank() == 0:
            step(alone.loss, optimizers[0])

    return {
        "alone": by_itself,
        "beside": lambda: step(alone.loss, optimizers[0]),
        "together": lambda: step(run, optimizers[1]),
        "sending": lambda: dist.all_reduce(gradients),
    }


def measure(shape: str, tiny: bool, turns: int, rows: int) -> dict[str, Any]:
    """Seconds of every way of every arm, one entry a turn; bytes on paper, and those that DDP has summed."""
    found: dict[str, Any] = {name: {} for name in ("series", "bytes", "counted", "parts", "summed_in")}
    for name in ARMS:
        sent: list[int] = []
        ways = _ways(name, shape, tiny, rows, sent)
        series: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(_WARM + turns):
            sent.clear()
            for way, call in ways.items():
                dist.barrier()
                started = time.perf_counter()
                call()
                dist.barrier()  # the slowest decides
                if turn >= _WARM:
                    series[way].append(time.perf_counter() - started)
        found["series"] |= {f"{name}/{way}": seconds for way, seconds in series.items()}
        if sent:  # in the last turn: DDP cuts its buckets anew after the first
            found["counted"][name], found["summed_in"][name] = sum(sent), len(sent)
        load = load_of(build_arm(name, shape, tiny, 1), rows)
        found["bytes"][name], found["parts"][name] = load.bytes, load.parts
    latency = torch.zeros(1)
    found["series"]["latency"] = [_seconds(lambda: dist.all_reduce(latency)) for _ in range(10 * turns)]
    found["results"] = {name: median(seconds) for name, seconds in found["series"].items()}
    return found


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Measure, and let the first process write."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    file, shape, turns, rows = sys.argv[1:5]
    found = measure(shape, "--tiny" in sys.argv, int(turns), int(rows))
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    gc.collect()  # the sharded modules hold the group: its threads would end after the interpreter, and abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
