"""The sampler and the loader."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peft_lightning.data.cache import Encoded
from peft_lightning.data.collate import PaddingCollate
from peft_lightning.data.loader import Batch, LengthGroupedSampler, Loader, _held_back
from peft_lightning.errors import DataError, UsageError
from tests.reference.sampler import counted_rows, global_batches

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=60).map(np.array)


def samplers(lengths: np.ndarray, batch_size: int, world: int, **options: Any) -> list[LengthGroupedSampler]:
    """One sampler per rank."""
    return [LengthGroupedSampler(lengths, batch_size, world_size=world, rank=rank, **options) for rank in range(world)]


def plans(lengths: np.ndarray, batch_size: int, world: int, epoch: int = 0, **options: Any) -> list[Any]:
    """One plan per rank."""
    return [sampler.plan(epoch) for sampler in samplers(lengths, batch_size, world, **options)]


def split_of(lengths: np.ndarray) -> Encoded:
    """A split whose row r holds the tokens 100 r, 100 r + 1, ..., and the label r."""
    values = np.concatenate([100 * row + np.arange(n) for row, n in enumerate(lengths)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ragged = {"input_ids": (values, offsets), "token_type_ids": (values * 0 + 1, offsets)}
    return Encoded({"labels": np.arange(len(lengths))}, ragged)


def loader_of(lengths: np.ndarray, batch_size: int = 4, shuffle: bool = True, **options: Any) -> Loader:
    """A loader of one rank."""
    sampler = LengthGroupedSampler(lengths, batch_size, shuffle=shuffle)
    return Loader(PaddingCollate(split_of(lengths), pad_token_id=7), sampler, **options)


# -- the sampler


@given(lengths=LENGTHS, batch_size=st.integers(1, 5), world=st.integers(1, 4))
def test_evaluation_counts_every_row_once(lengths: np.ndarray, batch_size: int, world: int) -> None:
    dealt = plans(lengths, batch_size, world, shuffle=False)
    assert counted_rows(dealt) == list(range(len(lengths)))
    assert {len(plan) for plan in dealt} == {-(-len(lengths) // (batch_size * world))}
    assert all(1 <= len(batch.rows) <= batch_size for plan in dealt for batch in plan)
    assert all(batch.valid or len(batch.rows) == 1 for plan in dealt for batch in plan)
    order = [row for step in global_batches(dealt) for row in step]
    assert order == sorted(range(len(lengths)), key=lambda row: -lengths[row])


@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 5),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_training_deals_every_row_at_most_once(
    lengths: np.ndarray, batch_size: int, world: int, epoch: int, data: st.DataObject
) -> None:
    if len(lengths) < world:
        return
    hands = samplers(lengths, batch_size, world, shuffle=True)
    dealt = [sampler.plan(epoch) for sampler in hands]
    rows, size = counted_rows(dealt), batch_size * world
    rest = len(lengths) % size
    left_out = rest if rest < world else 0
    assert len(rows) == len(set(rows)) == len(lengths) - left_out
    assert {len(plan) for plan in dealt} == {len(hands[0])} == {len(lengths) // size + (rest >= world)}
    steps = global_batches(dealt)
    assert all(len(step) == size for step in steps[: len(lengths) // size])
    assert all(batch.valid and len(batch.rows) for plan in dealt for batch in plan)


@given(lengths=LENGTHS, batch_size=st.integers(1, 3), epoch=st.integers(0, 3))
def test_two_ranks_see_the_global_batches_of_one(lengths: np.ndarray, batch_size: int, epoch: int) -> None:
    if len(lengths) < 2:
        return
    one = global_batches(plans(lengths, 2 * batch_size, 1, epoch, shuffle=True, seed=3))
    two = global_batches(plans(lengths, batch_size, 2, epoch, shuffle=True, seed=3))
    # A single row that is left over cannot be dealt to two ranks.
    assert two == (one[:-1] if len(lengths) % (2 * batch_size) == 1 else one)


@given(lengths=LENGTHS, batch_size=st.integers(1, 5), world=st.integers(1, 4))
def test_a_random_order_of_every_row_loses_none(lengths: np.ndarray, batch_size: int, world: int) -> None:
    dealt = plans(lengths, batch_size, world, shuffle=True, every=True)
    assert counted_rows(dealt) == list(range(len(lengths)))
    assert {len(plan) for plan in dealt} == {-(-len(lengths) // (batch_size * world))}
    alone = plans(lengths, batch_size * world, 1, shuffle=True)
    assert global_batches(dealt) == global_batches(alone)


def test_every_row_is_trained_on_sooner_or_later() -> None:
    lengths = np.arange(1, 12)
    seen = {row for epoch in range(20) for row in counted_rows(plans(lengths, 2, 2, epoch, shuffle=True))}
    lost = [set(range(11)) - set(counted_rows(plans(lengths, 5, 2, epoch, shuffle=True))) for epoch in range(20)]
    assert seen == set(range(11))
    assert all(len(rows) == 1 for rows in lost) and len(set.union(*lost)) > 3


def test_orders_differ_by_epoch_and_seed_only() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    orders = [
        global_batches(plans(lengths, 8, 1, epoch, shuffle=True, seed=seed))
        for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3] and orders[2] != orders[3]


def test_training_batches_hold_similar_lengths_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 6400)
    grouped = [lengths[batch.rows] for batch in LengthGroupedSampler(lengths, 32, shuffle=True).plan(0)]
    padding = 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in grouped)
    assert padding < 0.05
    means = np.array([batch.mean() for batch in grouped])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_below_one(batch_size: int) -> None:
    with pytest.raises(UsageError, match=f"batch_size is {batch_size}; allowed: at least 1"):
        LengthGroupedSampler(np.ones(3), batch_size, shuffle=True)


def test_fewer_rows_than_ranks() -> None:
    with pytest.raises(DataError, match="the split has 2 rows for 3 ranks; allowed: one for each"):
        LengthGroupedSampler(np.ones(2), 4, shuffle=True, world_size=3)
    assert len(LengthGroupedSampler(np.ones(2), 4, shuffle=False, world_size=3)) == 1


@given(size=st.integers(1, 60), batch_size=st.integers(1, 5), world=st.integers(1, 4), epoch=st.integers(0, 3))
def test_whole_batches_only(size: int, batch_size: int, world: int, epoch: int) -> None:
    lengths = np.arange(size) % 7 + 1
    if size < batch_size * world:
        return
    dealt = plans(lengths, batch_size, world, epoch, shuffle=True, whole=True)
    assert {len(batch.rows) for plan in dealt for batch in plan} == {batch_size}
    assert {len(plan) for plan in dealt} == {size // (batch_size * world)}
    assert {len(sampler) for sampler in samplers(lengths, batch_size, world, shuffle=True, whole=True)} == {
        size // (batch_size * world)
    }
    others = global_batches(plans(lengths, batch_size, world, epoch, shuffle=True))
    assert global_batches(dealt) == others[: size // (batch_size * world)]
    # Evaluation loses nothing.
    assert counted_rows(plans(lengths, batch_size, world, shuffle=False, whole=True)) == list(range(size))


def test_fewer_rows_than_a_whole_batch() -> None:
    with pytest.raises(DataError, match="the split has 7 rows for a global batch of 8; allowed: at least 8"):
        LengthGroupedSampler(np.ones(7), 4, shuffle=True, world_size=2, whole=True)


@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 5),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_places_count_through_the_global_batch(
    lengths: np.ndarray, batch_size: int, world: int, epoch: int, shuffle: bool
) -> None:
    if shuffle and len(lengths) < world:
        return
    dealt = plans(lengths, batch_size, world, epoch, shuffle=shuffle)
    alone = plans(lengths, batch_size * world, 1, epoch, shuffle=shuffle)[0]
    for number, batches in enumerate(zip(*dealt, strict=True)):
        assert all((batch.epoch, batch.number) == (epoch, number) for batch in batches)
        assert all(len(batch.places) == len(batch.rows) for batch in batches)
        placed = sorted(pair for batch in batches if batch.valid for pair in zip(batch.places, batch.rows, strict=True))
        assert placed == list(enumerate(alone[number].rows))


# -- state


def rows_read(loader: Loader, count: int | None = None) -> list[list[int]]:
    """The rows of the next ``count`` batches."""
    result = []
    for batch in loader:
        result.append(batch["rows"].tolist())
        if len(result) == count:
            break
    return result


@given(size=st.integers(1, 40), batch_size=st.integers(1, 7), epoch=st.integers(0, 2), data=st.data())
def test_continuing_anywhere_gives_the_rest(size: int, batch_size: int, epoch: int, data: st.DataObject) -> None:
    lengths = np.arange(size) % 5 + 1
    whole = rows_read(loader_of(lengths, batch_size, epoch=lambda: epoch))
    stop = data.draw(st.integers(1, len(whole)))
    first = loader_of(lengths, batch_size, epoch=lambda: epoch)
    assert rows_read(first, stop) == whole[:stop]
    state = first.state_dict()
    second = loader_of(lengths, batch_size, epoch=lambda: epoch)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert rows_read(second) == whole[stop:]
    assert second.state_dict()["position"] == len(whole)
    assert rows_read(second) == whole


def test_a_collate_sees_nothing_but_the_batch() -> None:
    seen: list[Batch] = []

    def collate(batch: Batch) -> dict[str, Any]:
        seen.append(batch)
        return {"rows": torch.from_numpy(batch.rows)}

    sampler = LengthGroupedSampler(np.arange(10) + 1, 4, shuffle=True)
    assert len(rows_read(Loader(collate, sampler, epoch=lambda: 3))) == 3
    for batch, planned in zip(seen, sampler.plan(3), strict=True):
        assert [np.array(part).tolist() for part in batch] == [np.array(part).tolist() for part in planned]


@pytest.mark.parametrize("stop", [1, 5])
def test_position_counts_what_was_taken_not_what_workers_prepared(stop: int) -> None:
    lengths = np.arange(40) % 5 + 1
    whole = rows_read(loader_of(lengths))
    loader = loader_of(lengths, workers=1)
    assert rows_read(loader, stop) == whole[:stop]
    assert loader.state_dict()["position"] == stop
    rest = loader_of(lengths, workers=1)
    rest.load_state_dict(loader.state_dict())
    assert rows_read(rest) == whole[stop:]


def test_batches_do_not_depend_on_workers() -> None:
    lengths = np.arange(10) % 3 + 1
    for alone, helped in zip(loader_of(lengths), loader_of(lengths, workers=2), strict=True):
        assert_close(alone, helped)


def test_state_of_another_epoch_starts_afresh() -> None:
    lengths = np.arange(20) % 5 + 1
    first = loader_of(lengths, epoch=lambda: 1)
    rows_read(first, 3)
    later = loader_of(lengths, epoch=lambda: 2)
    later.load_state_dict(first.state_dict())
    assert rows_read(later) == rows_read(loader_of(lengths, epoch=lambda: 2))


def test_asking_for_an_iterator_changes_nothing() -> None:
    lengths = np.arange(20) % 5 + 1
    loader = loader_of(lengths)
    rows_read(loader, 3)
    state = loader.state_dict()
    iter(loader)
    assert loader.state_dict() == state
    fresh = loader_of(lengths)
    fresh.load_state_dict(state)
    iter(fresh)
    assert rows_read(fresh) == rows_read(loader_of(lengths))[3:]


def test_every_epoch_is_asked_for_when_it_begins() -> None:
    lengths, epochs = np.arange(20) % 5 + 1, iter([4, 5])
    loader = loader_of(lengths, epoch=lambda: next(epochs))
    assert rows_read(loader) == rows_read(loader_of(lengths, epoch=lambda: 4))
    assert loader.state_dict() == {"epoch": 4, "position": 5, "global_batch_size": 4, "stream": {}}
    assert rows_read(loader) == rows_read(loader_of(lengths, epoch=lambda: 5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_leaves_workers_alone(number: int) -> None:
    """The process that reads has to save first; however often launchers pass it on, and however young they are."""
    lengths, before = np.arange(200) % 9 + 1, multiprocessing.active_children()
    reading = iter(loader_of(lengths, workers=2))
    seen = [next(reading)]
    workers = [child for child in multiprocessing.active_children() if child not in before]
    signalled = ["kill", f"-{int(number)}", *(str(worker.pid) for worker in workers)]
    subprocess.run(signalled, check=True)
    seen += [next(reading) for _ in range(8)]  # both have begun
    for _ in range(3):
        subprocess.run(signalled, check=True)
    seen += list(reading)
    assert len(workers) == 2 and sum(len(batch["labels"]) for batch in seen) == 200


def test_workers_end_when_their_owner_says_so() -> None:
    before = multiprocessing.active_children()
    reading = iter(loader_of(np.arange(200) % 9 + 1, workers=2))
    next(reading)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # by torch, as soon as one has
        for worker in workers:
            worker.terminate()
        time.sleep(10)
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [143, 143]


def test_signals_that_came_while_workers_started_are_heard_afterwards() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with _held_back():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert not heard
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(workers: int) -> None:
    before = torch.random.get_rng_state()
    rows_read(loader_of(np.arange(8) + 1, workers=workers))
    assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)


def test_state_in_batches_of_another_size_is_refused() -> None:
    state = {"epoch": 0, "position": 2, "global_batch_size": 8}
    with pytest.raises(UsageError, match="batch_size times ranks is 4; allowed to go on with a run: 8, as before"):
        loader_of(np.arange(20) + 1).load_state_dict(state)
    loader_of(np.arange(20) + 1).load_state_dict({**state, "position": 0})


STREAM = {"seed": 3, "texts": "abc", "whole": False}


@pytest.mark.parametrize("taken", [0, 2, 5])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed is 4, was 3; allowed to go on with a run: the data that it began with"),
        ({"whole": True}, "whole is True, was False; allowed"),
        ({"texts": "xyz"}, "texts: not the same; allowed"),
        ({"seed": 4, "texts": "xyz"}, "seed is 4, was 3, texts: not the same; allowed"),
    ],
)
def test_state_of_another_stream_is_refused(taken: int, epoch: int, changes: dict[str, Any], message: str) -> None:
    lengths = np.arange(20) % 5 + 1
    first = loader_of(lengths, stream=STREAM)
    for number, _ in enumerate(first, 1):
        if number >= taken:
            break
    state = first.state_dict()
    other = loader_of(lengths, stream={**STREAM, **changes}, epoch=lambda: epoch)
    with pytest.raises(UsageError) as caught:
        other.load_state_dict(state)
    assert str(caught.value).startswith(message)
    assert other.state_dict()["position"] == 0
    loader_of(lengths, stream=STREAM, epoch=lambda: epoch, workers=1).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"stream": {}}, {"stream": {"seed": 3}}, {"stream": {**STREAM, "gone": 1}}])
def test_older_states_say_less(state: dict[str, Any]) -> None:
    loader = loader_of(np.arange(20) + 1, stream=STREAM)
    loader.load_state_dict({"epoch": 0, "position": 2, "global_batch_size": 4, **state})
    assert loader.state_dict()["position"] == 2 and loader.state_dict()["stream"] == STREAM
