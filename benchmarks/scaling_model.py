"""On paper: how long a step takes on N devices, from what it computes, what it sends, and how fast both go.

With F operations of a step on a device, U of its peak that is reached in practice, S bytes that are summed over N = g m
devices (m nodes of g), B the bytes per second of a device within its node, W those that leave and enter a node, and a
latency L of a message:

    compute   C = F / U
    sending   A = w (S ((g - 1) / g / B + (m - 1) / m / W) + K L log2 N)

w counts how often the bytes pass: 2 for ``ddp`` (a sum and its spread), 3 for ``fsdp2`` (weights gathered for the
forward and for the backward pass, gradients summed to their owner). They pass in K parts, each of which waits for the
latency by itself: DDP's buckets, FSDP's blocks. Sending overlaps with the backward pass in part: a
step takes at most C + A, and at least max(C, A). Steps per second are for batches that grow with N (weak scaling).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["MACHINES", "Load", "Machine", "bounds", "sending"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal devices.

    Attributes:
        title: for tables.
        devices: g, of a node.
        flops: operations per second of a device that are reached in practice.
        inside: bytes per second that a device sends to others of its node.
        between: bytes per second that leave a node.
        latency: seconds of a message.
    """

    title: str
    devices: int
    flops: float
    inside: float
    between: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """A step of one device: operations, bytes that are summed over all, how often these pass, and in how many parts."""

    flops: float
    bytes: int
    passes: int = 2
    parts: int = 1


# An A100 has 312 TFLOP/s in bfloat16, of which models of this size reach about a third, and 300 GB/s each way in its
# node. Eight HDR links of 200 Gb/s leave a good node, one Ethernet of 100 Gb/s a cheap one. Assumed, not measured.
_A100 = {"devices": 8, "flops": 0.35 * 312e12, "inside": 300e9, "latency": 1e-5}
MACHINES = {
    "infiniband": Machine(title="8 A100, 8 x 200 Gb/s between nodes", between=8 * 25e9, **_A100),  # type: ignore[arg-type]
    "ethernet": Machine(title="8 A100, 100 Gb/s between nodes", between=12.5e9, **_A100),  # type: ignore[arg-type]
}


def sending(load: Load, machine: Machine, ranks: int) -> float:
    """Seconds that it takes to sum a step's bytes over ``ranks`` devices; whole nodes, if it is more than one.

    >>> slow = Machine(title="", devices=2, flops=1, inside=1e9, between=1e8, latency=0)
    >>> [sending(Load(flops=0, bytes=10**9), slow, ranks) for ranks in (1, 2, 4)]
    [0.0, 1.0, 11.0]
    """
    devices = min(ranks, machine.devices)
    nodes = math.ceil(ranks / machine.devices)
    inside = (devices - 1) / devices / machine.inside
    between = (nodes - 1) / nodes / machine.between
    waiting = load.parts * machine.latency * math.log2(max(1, ranks))
    return load.passes * (load.bytes * (inside + between) + waiting)


def bounds(load: Load, machine: Machine, ranks: int) -> tuple[float, float]:
    """Seconds of a step if all of the sending hides behind computing, and if none does."""
    compute, sent = load.flops / machine.flops, sending(load, machine, ranks)
    return max(compute, sent), compute + sent
