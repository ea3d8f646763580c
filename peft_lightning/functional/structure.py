"""Which heads and neurons go, and which ranks the blocks get (Prune-LoRA, sections 3.2 and 3.3).

The paper removes the 44 least important of 144 heads and gives LoRA rank 8 in the 4 most important blocks and 4 in the
others. Here each layer also keeps a given number of units at least; ranks can be shared out in proportion to the
blocks' importance; and a budget can take the count's place. It takes the same share of heads and of neurons: their
importance has no common measure, for what many neurons lose one by one is not what they lose together. Equal scores are
taken in the order of layers and units.

Symbols: a *layer* is one attention, or one feed-forward block; a *unit* one head (or group of heads) or one neuron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from peft_lightning.errors import UsageError

__all__ = ["count_of", "drop_lowest", "drop_to_budget", "share_ranks", "top_ranks"]

Kept: TypeAlias = dict[str, list[int]]


def count_of(wanted: int | float, total: int, option: str) -> int:
    """A number of units from a count or a share.

    Args:
        wanted: whole number, or share in [0, 1).
        total: units there are.
        option: its name, for messages.

    Raises:
        UsageError: if it is negative or more than there are.

    >>> [count_of(wanted, 144, "heads_to_prune") for wanted in (44 / 144, 0.25, 7)]
    [44, 36, 7]
    """
    if isinstance(wanted, bool) or not (0 <= wanted < 1 or (isinstance(wanted, int) and 0 <= wanted <= total)):
        raise UsageError(f"{option} = {wanted!r}: must be a count from 0 to {total}, or a share in [0, 1)")
    return wanted if isinstance(wanted, int) else round(wanted * total)


def drop_lowest(scores: Mapping[str, Tensor], drop: int, least: int, option: str) -> Kept:
    """Remove the units of the lowest scores, over all layers together.

    Args:
        scores: layer -> ``[U]``.
        drop: how many units go.
        least: how many each layer keeps at least (all that it has, if these are fewer).
        option: name of ``drop``, for messages.

    Returns:
        layer -> kept units, in order; exactly ``drop`` fewer in all.

    Raises:
        UsageError: if so many cannot go.

    >>> drop_lowest({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 2, 1, "heads_to_prune")
    {'a': [1], 'b': [1]}
    """
    candidates = _candidates(scores, dict.fromkeys(scores, least))
    if drop > len(candidates):
        total = sum(len(tensor) for tensor in scores.values())
        raise UsageError(
            f"{option} = {drop}: at most {len(candidates)} of {total} can go if each layer keeps {least} at least"
        )
    return _without(scores, sorted(candidates)[:drop])


def drop_to_budget(
    kinds: Sequence[Mapping[str, Tensor]],
    costs: Mapping[str, int],
    least: Mapping[str, int],
    most: int,
    total: int,
    option: str,
) -> Kept:
    """Remove the same share of each kind of unit, the lowest scores first, until the whole costs no more than a budget.

    Args:
        kinds: for heads, and for neurons: layer -> ``[U]``. Scores of different kinds are not compared.
        costs: layer -> what one of its units costs.
        least: layer -> how many units it keeps at least.
        most: the budget.
        total: what everything costs now, units and all else.
        option: name of the budget, for messages.

    Returns:
        layer -> kept units, in order. The last one to go meets the budget, and may cost more than was still asked for:
        keeping some of another kind instead would give up the same share. Where a kind has no more to give, the others
        go on.

    Raises:
        UsageError: if it cannot be met; says what can.

    >>> heads, neurons = {"a": torch.tensor([1.0, 5.0])}, {"b": torch.tensor([7.0, 6.0, 9.0, 8.0])}
    >>> drop_to_budget([heads, neurons], {"a": 10, "b": 1}, {"a": 0, "b": 0}, 13, 24, "target")
    {'a': [1], 'b': [0, 2, 3]}
    """
    candidates = []
    for number, layers in enumerate(kinds):
        free = sorted(_candidates(layers, least))
        count = sum(map(len, layers.values()))
        candidates += [((place + 1) / count, number, candidate) for place, candidate in enumerate(free)]
    gone = []
    for _, _, candidate in sorted(candidates):
        if total <= most:
            break
        total -= costs[candidate[3]]
        gone.append(candidate)
    if total > most:
        raise UsageError(f"{option}: cannot be met; with all gone that may go, {total:,} are left, not {most:,}")
    return _without({layer: scores for layers in kinds for layer, scores in layers.items()}, gone)


def top_ranks(scores: Mapping[str, float], low: int, high: int, count: int | None) -> dict[str, int]:
    """The higher rank for the most important blocks.

    Args:
        scores: block -> importance.
        low: rank of the others.
        high: rank of the most important.
        count: how many these are; None: 4, or all where there are fewer.

    Raises:
        UsageError: if there are fewer blocks than ``count``.

    >>> top_ranks({"a": 0.1, "b": 0.9, "c": 0.5}, 4, 8, 1)
    {'a': 4, 'b': 8, 'c': 4}
    """
    if count is not None and not 0 <= count <= len(scores):
        raise UsageError(f"lora.high_blocks = {count}: must be from 0 to {len(scores)}, the number of blocks")
    count = min(_HIGH_BLOCKS, len(scores)) if count is None else count
    best = set(sorted(scores, key=lambda block: -scores[block])[:count])
    return {block: high if block in best else low for block in scores}


_HIGH_BLOCKS = 4


def share_ranks(scores: Mapping[str, float], budget: int) -> dict[str, int]:
    """Ranks in proportion to importance: each block gets 1, what is left is shared out.

    Args:
        scores: block -> importance, at least 0.
        budget: sum of all ranks.

    Returns:
        block -> rank; their sum is exactly ``budget``: shares are rounded down, the largest remainders get one more.

    Raises:
        UsageError: if the budget is below the number of blocks.

    >>> share_ranks({"a": 3.0, "b": 1.0}, 10)
    {'a': 7, 'b': 3}
    """
    if budget < len(scores):
        raise UsageError(f"lora.budget = {budget}: must be at least {len(scores)}, rank 1 for each block")
    total = sum(scores.values())
    left = budget - len(scores)
    shares = {block: left * (score / total if total > 0 else 1 / len(scores)) for block, score in scores.items()}
    ranks = {block: 1 + int(share) for block, share in shares.items()}
    first = sorted(shares, key=lambda block: int(shares[block]) - shares[block])
    for block in first[: budget - sum(ranks.values())]:
        ranks[block] += 1
    return ranks


def _candidates(scores: Mapping[str, Tensor], least: Mapping[str, int]) -> list[tuple[float, int, int, str]]:
    """(score, place of the layer, unit, layer) of what may go: all but the best ``least`` units of each layer."""
    found = []
    for place, (layer, tensor) in enumerate(scores.items()):
        order: Sequence[int] = torch.argsort(tensor, stable=True).tolist()
        values = tensor.tolist()
        found += [(values[unit], place, unit, layer) for unit in order[: max(0, len(order) - least[layer])]]
    return found


def _without(scores: Mapping[str, Tensor], gone: Sequence[tuple[float, int, int, str]]) -> Kept:
    removed: dict[str, set[int]] = {layer: set() for layer in scores}
    for _, _, unit, layer in gone:
        removed[layer].add(unit)
    return {
        layer: [unit for unit in range(len(tensor)) if unit not in removed[layer]] for layer, tensor in scores.items()
    }
