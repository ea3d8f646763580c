"""Masks and counts: exact whatever the scores, the right entries, and loud degenerate cases."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_lightning.errors import UsageError
from peft_lightning.functional.sparsify import DegenerateScoreError, erdos_renyi_counts, kept_count, top_masks
from tests.reference.masks import bisected_erdos_renyi, loop_top_masks

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


def _kept(masks: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(name, i) for name, mask in masks.items() for i in mask.flatten().nonzero().flatten().tolist()}


# -- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    with pytest.raises(UsageError, match=r"sparsity = .*at least 0 and below 1"):
        kept_count(9, sparsity)


@given(
    shapes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=6),
    share=st.floats(0, 1),
)
def test_erdos_renyi_shares(shapes: list[list[int]], share: float) -> None:
    named = {f"t{i}": tuple(shape) for i, shape in enumerate(shapes)}
    kept = max(1, round(share * sum(map(prod, shapes))))
    expected = bisected_erdos_renyi(named, kept)
    try:
        counts = erdos_renyi_counts(named, kept)
    except DegenerateScoreError as error:
        # allowed only where a share rounds to nothing
        assert min(expected[name] for name in named if name in str(error)) < 1 + 1e-6
        return
    assert sum(counts.values()) == kept
    for name, shape in named.items():
        assert 1 <= counts[name] <= prod(shape)
        assert abs(counts[name] - expected[name]) < 1 + 1e-6  # rounded up or down


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), number=st.integers(1, 7), share=st.floats(0.2, 1))
def test_erdos_renyi_of_equal_shapes_is_uniform(shape: tuple[int, int], number: int, share: float) -> None:
    kept = max(number, round(share * number * prod(shape)))
    counts = list(erdos_renyi_counts({str(i): shape for i in range(number)}, kept).values())
    assert counts == [kept // number + (i < kept % number) for i in range(number)]


def test_erdos_renyi_gives_what_a_full_matrix_cannot_take_to_the_others() -> None:
    # sums of sides 11, 20 and 20: at 110 kept, 11/51 of them is more than the flat matrix has
    counts = erdos_renyi_counts({"flat": (1, 10), "a": (10, 10), "b": (10, 10)}, 110)
    assert counts == {"flat": 10, "a": 50, "b": 50}


def test_erdos_renyi_largest_remainders_come_first() -> None:
    # shares 10/3 * (4, 5, 6) / 5 = 2.67, 3.33, 4
    assert erdos_renyi_counts({"a": (2, 2), "b": (2, 3), "c": (3, 3)}, 10) == {"a": 3, "b": 3, "c": 4}


@pytest.mark.parametrize("kept", [0, -1, 5])
def test_erdos_renyi_count_out_of_range(kept: int) -> None:
    with pytest.raises(UsageError, match=rf"kept = {kept}: must be from 1 to 4"):
        erdos_renyi_counts({"a": (2, 2)}, kept)


def test_erdos_renyi_of_nothing() -> None:
    with pytest.raises(UsageError, match="no tensor to prune"):
        erdos_renyi_counts({}, 1)


def test_erdos_renyi_leaves_no_tensor_empty() -> None:
    with pytest.raises(DegenerateScoreError, match=r"small: no weight of it would stay; lower prune\.sparsity"):
        erdos_renyi_counts({"large": (90, 90), "small": (1, 1)}, 4)


# -- masks -------------------------------------------------------------------------------------------------------


@given(shapes=SHAPES, share=st.floats(0.01, 0.99), levels=st.integers(2, 5), seed=st.integers(0, 99))
def test_counts_are_exact_with_many_ties(shapes: list[tuple[int, int]], share: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randint(levels, shape, generator=generator).float() for i, shape in enumerate(shapes)}
    total = sum(z.numel() for z in scores.values())
    kept = max(1, round(share * total))
    try:
        masks = top_masks(scores, kept, seed=seed)
    except DegenerateScoreError:
        # allowed only if a tensor's scores all tie, or if some tensor could really end up with nothing
        flat = any(z.numel() > 1 and z.unique().numel() == 1 for z in scores.values())
        assert flat or kept <= total - min(z.numel() for z in scores.values())
        return
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    lowest_kept = min(float(z[masks[name]].min()) for name, z in scores.items())
    removed = [float(z[~masks[name]].max()) for name, z in scores.items() if not masks[name].all()]
    assert all(z <= lowest_kept for z in removed)


@given(shapes=SHAPES, share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_a_count_for_each_tensor_equals_a_plain_sort_of_each(
    shapes: list[tuple[int, int]], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    kept = {name: max(1, round(share * z.numel())) for name, z in scores.items()}
    masks = top_masks(scores, kept)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == kept
    assert _kept(masks) == loop_top_masks(scores, kept)


@pytest.mark.parametrize("kept", [1 + 24, 35, 58])
def test_masks_equal_a_plain_sort(kept: int) -> None:
    torch.manual_seed(0)
    scores = {"a": torch.randn(7, 5), "b": torch.randn(4, 6) * 3}
    masks = top_masks(scores, kept)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    assert _kept(masks) == loop_top_masks(scores, kept)
    assert {name: mask.shape for name, mask in masks.items()} == {name: z.shape for name, z in scores.items()}


@pytest.mark.parametrize("kept", [7, 75, {"a": 13}])
def test_ties_depend_on_the_seed_only(kept: int | dict[str, int]) -> None:
    scores = {"a": torch.cat([torch.zeros(50), torch.ones(50)]).view(10, 10)}
    one, again, other = (top_masks(scores, kept, seed=seed)["a"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_half_precision_of_scores_does_not_round_them_into_ties() -> None:
    scores = {"a": torch.tensor([1.0, 1.0 + 2**-20])}
    assert top_masks(scores, 1)["a"].tolist() == [False, True]


def test_where_all_stays_the_scores_are_not_looked_at() -> None:
    unsound = torch.full((2, 2), float("nan"))
    assert top_masks({"a": unsound}, 4)["a"].all()
    masks = top_masks({"a": unsound, "b": torch.arange(4.0)}, {"a": 4, "b": 1})
    assert masks["a"].all()
    assert masks["b"].tolist() == [False, False, False, True]


def test_masks_come_back_on_the_scores_device(device: str) -> None:
    torch.manual_seed(0)
    scores = {"a": torch.randn(5, 5, device=device)}
    mask = top_masks(scores, 9)["a"]
    assert (mask.device.type, mask.dtype) == (device, torch.bool)
    assert torch.equal(mask.cpu(), top_masks({"a": scores["a"].cpu()}, 9)["a"])


@pytest.mark.parametrize("kept", [-1, 0, 10])
def test_count_out_of_range(kept: int) -> None:
    with pytest.raises(UsageError, match=rf"kept = {kept}: must be from 1 to 9"):
        top_masks({"a": torch.randn(3, 3)}, kept)


@pytest.mark.parametrize("kept", [-1, 10])
def test_count_of_one_tensor_out_of_range(kept: int) -> None:
    with pytest.raises(UsageError, match=rf"kept\['a'\] = {kept}: must be from 0 to 9"):
        top_masks({"a": torch.randn(3, 3)}, {"a": kept})


def test_counts_for_other_tensors() -> None:
    with pytest.raises(UsageError, match=r"kept names \['b'\]: must name the tensors \['a'\]"):
        top_masks({"a": torch.randn(3, 3)}, {"b": 1})


@pytest.mark.parametrize("scores", [{}, {"a": torch.zeros(0, 3)}])
def test_nothing_to_prune(scores: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match="no tensor to prune"):
        top_masks(scores, 1)


@pytest.mark.parametrize("kept", [6, {"down": 3, "up": 3}])
def test_degenerate_scores_name_the_tensor_and_the_remedy(kept: int | dict[str, int]) -> None:
    with pytest.raises(DegenerateScoreError, match=r"up: 1 of 4 scores are not finite; .*adapter.scaling"):
        top_masks({"down": torch.arange(4.0), "up": torch.tensor([1.0, 2.0, float("nan"), 3.0])}, kept)
    with pytest.raises(DegenerateScoreError, match=r"^up: all 4 scores equal 0, .*score_init = surrogate or warmup"):
        top_masks({"down": torch.arange(1.0, 5.0), "up": torch.zeros(4)}, kept)
    with pytest.raises(DegenerateScoreError, match=r"prune\.score = random"):
        top_masks({"down": torch.arange(1.0, 5.0), "up": torch.zeros(4)}, kept)


def test_all_degenerate_tensors_are_named() -> None:
    with pytest.raises(DegenerateScoreError, match=r"down: all 4 scores equal 2; up: all 4 scores equal 0"):
        top_masks({"down": torch.full((4,), 2.0), "up": torch.zeros(4)}, 4)


def test_a_tensor_of_one_entry_is_not_degenerate() -> None:
    assert top_masks({"a": torch.arange(4.0), "gate": torch.full((1,), 9.0)}, 3)["gate"].all()


@pytest.mark.parametrize("kept", [4, {"down": 4, "up": 0}])
def test_a_tensor_with_nothing_left(kept: int | dict[str, int]) -> None:
    with pytest.raises(DegenerateScoreError, match=r"^up: no weight of it would stay; .*prune\.scope = tensor"):
        top_masks({"down": torch.arange(1.0, 9.0), "up": torch.arange(4.0) / 8}, kept)
