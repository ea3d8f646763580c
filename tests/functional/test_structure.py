"""What goes: exact numbers, the lowest first, never below what a layer keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.structure import count_of, drop_lowest, drop_to_budget, share_ranks, top_ranks

LAYERS = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=5), min_size=1, max_size=5)


def layers(rows: list[list[int]]) -> dict[str, Tensor]:
    return {f"layer{number}": torch.tensor(row, dtype=torch.float64) for number, row in enumerate(rows)}


@given(rows=LAYERS, least=st.integers(0, 3), data=st.data())
def test_the_lowest_go(rows: list[list[int]], least: int, data: st.DataObject) -> None:
    scores = layers(rows)
    most = sum(max(0, len(row) - least) for row in rows)
    drop = data.draw(st.integers(0, most))
    kept = drop_lowest(scores, drop, least, "heads")
    assert sum(map(len, rows)) - sum(map(len, kept.values())) == drop
    free: list[int] = []
    gone: list[int] = []
    for row, units in zip(rows, kept.values(), strict=True):
        assert units == sorted(set(units)) and len(units) >= min(least, len(row))
        out = [row[unit] for unit in range(len(row)) if unit not in units]
        stayed = sorted(row[unit] for unit in units)
        assert not out or max(out) <= (stayed[0] if stayed else 9)  # inside a layer the lowest
        gone += out
        free += stayed[: max(0, len(stayed) - least)]
    assert not gone or not free or max(gone) <= min(free)  # and over all layers, but for what a layer keeps
    with pytest.raises(UsageError, match=rf"heads = {most + 1}: at most {most} of {sum(map(len, rows))} can go"):
        drop_lowest(scores, most + 1, least, "heads")


@given(heads=LAYERS, neurons=LAYERS, data=st.data())
def test_a_budget_is_met_with_no_unit_to_spare(
    heads: list[list[int]], neurons: list[list[int]], data: st.DataObject
) -> None:
    kinds = [layers(heads), {f"inner {name}": scores for name, scores in layers(neurons).items()}]
    scores = kinds[0] | kinds[1]
    costs = {layer: data.draw(st.integers(1, 9)) for layer in scores}
    least = {layer: data.draw(st.integers(0, 2)) for layer in scores}
    rest = 7
    total = rest + sum(costs[layer] * len(tensor) for layer, tensor in scores.items())
    floor = rest + sum(costs[layer] * min(least[layer], len(tensor)) for layer, tensor in scores.items())
    most = data.draw(st.integers(floor, total))

    def cost(kept: dict[str, list[int]]) -> int:
        return rest + sum(costs[layer] * len(units) for layer, units in kept.items())

    kept = drop_to_budget(kinds, costs, least, most, total, "target")
    assert cost(kept) <= most
    shares, left = [], []
    for kind in kinds:  # of each kind the same as by count
        count = sum(len(tensor) for tensor in kind.values())
        gone = count - sum(len(kept[layer]) for layer in kind)
        free = {layer: max(0, len(tensor) - least[layer]) for layer, tensor in kind.items()}
        assert gone <= sum(free.values())
        out = sorted(float(kind[layer][u]) for layer in kind for u in range(len(kind[layer])) if u not in kept[layer])
        may = sorted(s for layer in kind for s in sorted(kind[layer].tolist())[: free[layer]])
        assert out == may[:gone]
        shares.append(gone / count if count else 0.0)
        left.append((sum(free.values()) - gone, 1 / count if count else 0.0))
    for this, other in ((0, 1), (1, 0)):  # a kind is ahead by a unit at most, unless the other has no more to give
        if left[other][0]:
            assert shares[this] - shares[other] <= max(left[0][1], left[1][1]) + 1e-9
    if cost(kept) < total:  # the last one to go was needed: one unit of some layer could not have stayed
        dearest = max(costs[layer] for layer in scores if len(kept[layer]) < len(scores[layer]))
        assert cost(kept) + dearest > most
    if floor > rest:
        with pytest.raises(UsageError, match=rf"target: cannot be met; with all gone that may go, {floor:,} are left"):
            drop_to_budget(kinds, costs, least, floor - 1, total, "target")


def test_counts_and_shares() -> None:
    assert count_of(44 / 144, 144, "n") == 44 and count_of(44 / 144, 72, "n") == 22 and count_of(0, 0, "n") == 0
    for wanted in (145, -1, 1.0, -0.1, True, float("nan")):
        with pytest.raises(UsageError, match=r"n = .*: must be a count from 0 to 144, or a share in \[0, 1\)"):
            count_of(wanted, 144, "n")


def test_the_most_important_blocks_get_the_higher_rank() -> None:
    scores = {str(number): float(number % 5) for number in range(12)}
    ranks = top_ranks(scores, 4, 8, None)
    assert sorted(block for block in ranks if ranks[block] == 8) == ["3", "4", "8", "9"]
    assert list(ranks) == list(scores) and set(ranks.values()) == {4, 8}
    assert set(top_ranks({"a": 1.0, "b": 2.0}, 4, 8, None).values()) == {8}
    assert set(top_ranks(scores, 4, 8, 0).values()) == {4}
    with pytest.raises(UsageError, match=r"lora\.high_blocks = 13: must be from 0 to 12"):
        top_ranks(scores, 4, 8, 13)


@given(scores=st.lists(st.floats(0, 1e3), min_size=1, max_size=12), more=st.integers(0, 60))
def test_shared_ranks_are_exact_and_in_order(scores: list[float], more: int) -> None:
    named = {str(number): score for number, score in enumerate(scores)}
    ranks = share_ranks(named, len(scores) + more)
    assert sum(ranks.values()) == len(scores) + more and min(ranks.values()) >= 1
    total = sum(scores)
    for block, score in named.items():
        share = 1 + (more * score / total if total else more / len(scores))
        assert abs(ranks[block] - share) < 1 + 1e-6
    with pytest.raises(UsageError, match="must be at least"):
        share_ranks(named, len(scores) - 1)
