"""A slow oracle of the sampler: what its plans must satisfy, whatever their order."""

from __future__ import annotations

from collections.abc import Sequence

from peft_lightning.data.loader import Batch


def counted_rows(plans: Sequence[Sequence[Batch]]) -> list[int]:
    """Row numbers that count, over all ranks' plans of one epoch, sorted."""
    return sorted(int(row) for plan in plans for batch in plan if batch.valid for row in batch.rows)


def global_batches(plans: Sequence[Sequence[Batch]]) -> list[list[int]]:
    """The counted rows of each step over all ranks, in the order in which they were dealt out."""
    steps = []
    for batches in zip(*plans, strict=True):
        hands = [list(map(int, batch.rows)) if batch.valid else [] for batch in batches]
        rows = []
        for turn in range(max(map(len, hands))):
            rows += [hand[turn] for hand in hands if turn < len(hand)]
        steps.append(rows)
    return steps
