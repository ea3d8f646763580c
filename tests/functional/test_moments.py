"""Streamed moments equal those of all tokens at once, whatever the batches; memory is bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.moments import Moments
from tests.reference.transport import loop_second

SIZES = (3, 1, 4)


def _features(tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, size, generator=generator) + 1 for size in SIZES]


@given(cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 99))
def test_batches_add_up_to_all_tokens(cuts: list[int], seed: int) -> None:
    features = _features(40, seed)
    moments = Moments(SIZES)
    ends = [0, *sorted(cuts), 40]
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        moments.add([part[first:last] for part in features])
    second, mean = loop_second(features)
    assert moments.count == 40
    assert_close(moments.second(), second, atol=1e-12, rtol=1e-12)
    assert_close(moments.mean(), mean, atol=1e-12, rtol=1e-12)


def test_a_long_batch_is_taken_in_pieces() -> None:
    features = _features(5000)
    moments = Moments(SIZES)
    moments.add(features)
    rows = torch.cat(features, 1).double()
    assert moments.count == 5000
    assert_close(moments.second(), rows.t() @ rows / 5000)


def test_padding_does_not_count() -> None:
    keep = torch.tensor([[True, True, False], [True, False, False]])
    features = [part.view(2, 3, -1) for part in _features(6)]
    poisoned = [part.masked_fill(~keep[..., None], float("nan")) for part in features]
    moments = Moments(SIZES)
    moments.add(poisoned, keep)
    second, mean = loop_second([part[keep] for part in features])
    assert moments.count == 3
    assert_close(moments.second(), second)
    assert_close(moments.mean(), mean)


def test_half_precision_features_are_added_up_in_more() -> None:
    features = [part.bfloat16() for part in _features(3000)]
    moments = Moments(SIZES)
    for start in range(0, 3000, 100):
        moments.add([part[start : start + 100] for part in features])
    assert_close(moments.second(), loop_second(features)[0], atol=1e-10, rtol=1e-10)


def test_fp32_sums_do_for_distances() -> None:
    moments = Moments(SIZES, torch.float32)
    features = _features(4000)
    for start in range(0, 4000, 64):
        moments.add([part[start : start + 64] for part in features])
    assert moments.second().dtype == torch.float64
    assert_close(moments.second(), loop_second(features)[0], atol=1e-5, rtol=1e-5)


def test_sums_of_two_ranks_add_up() -> None:
    features, parts = _features(30), []
    for rows in (slice(0, 10), slice(10, 30)):
        parts.append(Moments(SIZES))
        parts[-1].add([part[rows] for part in features])
    idle = Moments(SIZES)
    for total, *others in zip(*(part.sums() for part in (idle, *parts)), strict=True):
        for other in others:
            total += other
    assert idle.count == 30
    assert_close(idle.second(), loop_second(features)[0])


def test_memory_does_not_grow_and_is_below_64_mb_for_a_whole_backbone() -> None:
    sites, sizes = 24, [64] * 8
    pre, post, refit = Moments(sizes, torch.float32), Moments(sizes), Moments([64, *sizes])
    for moments in (pre, post, refit):
        moments.add([torch.randn(10, 64) for _ in moments.sizes])
        before = moments.nbytes
        moments.add([torch.randn(3000, 64) for _ in moments.sizes])
        assert moments.nbytes == before
    assert sites * (pre.nbytes + post.nbytes) < 64e6
    assert sites * refit.nbytes < 64e6


def test_sums_stay_where_the_features_are(device: str) -> None:
    moments = Moments(SIZES)
    moments.add([part.to(device) for part in _features(9)])
    assert moments.sums()[1].device.type == device
    assert_close(moments.second(), loop_second(_features(9))[0])


@pytest.mark.parametrize("shapes", [[(5, 3), (5, 1)], [(5, 3), (5, 1), (4, 4)], [(5, 3), (5, 2), (5, 4)], []])
def test_features_of_other_shapes(shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match=r"features of shapes .*must be of \(3, 1, 4\) neurons for the same tokens"):
        Moments(SIZES).add([torch.zeros(shape) for shape in shapes])


def test_a_mask_of_another_shape() -> None:
    with pytest.raises(UsageError, match=r"a mask of shape \(6,\)"):
        Moments(SIZES).add(_features(5), torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("keep", [None, torch.zeros(5, dtype=torch.bool)])
def test_no_token(keep: Tensor | None) -> None:
    moments = Moments(SIZES)
    if keep is not None:
        moments.add(_features(5), keep)
    for read in (moments.second, moments.mean):
        with pytest.raises(UsageError, match="no activations"):
            read()
