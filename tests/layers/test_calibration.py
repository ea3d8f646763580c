"""Moments over batches: of which tokens, of how many, on which states, and over several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.layers.calibration import Calibration, Observed
from tests.layers.test_merging import backbone, batches, source
from tests.reference.calibration import look

KIND: Any = {"kind": "pfeiffer", "nonlinearity": "relu"}


def observe(bare: Any, data: Any, tokens: int = 10_000, whole: bool = True, **options: Any) -> Observed:
    family = [source(bare, number) for number in range(2)]
    calibration = Calibration(backbone=bare, batches=lambda: data, **{**KIND, **options})
    return calibration.observe([one.neurons() for one in family], ["pre", "post"], tokens, whole=whole)


def same(one: Observed, other: Observed) -> None:
    for site in one.post:
        assert_close(one.post[site].second(), other.post[site].second(), rtol=1e-5, atol=1e-9)
        assert_close(one.pre[site].mean(), other.pre[site].mean(), rtol=1e-4, atol=1e-6)


def test_moments_are_those_of_all_tokens_that_are_no_padding() -> None:
    bare = backbone()
    data = batches()
    found = observe(bare, data)
    seen = [look(bare, source(bare, number), data) for number in range(2)]
    for site, moments in found.post.items():
        for side, mine in (("before", found.pre[site]), ("after", moments)):
            features_NM = torch.cat([getattr(one[site], side) for one in seen], 1)
            assert mine.count == len(features_NM) == found.tokens
            assert_close(mine.second(), features_NM.t() @ features_NM / len(features_NM), rtol=1e-4, atol=1e-6)
            assert_close(mine.mean(), features_NM.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_the_shared_stream_is_the_bare_backbones(kind: str) -> None:
    """Where no adapter adds anything, both streams see the same."""
    bare = backbone()
    family = []
    for number in range(2):
        one = source(bare, number, kind=kind)
        silent = {n: torch.zeros_like(t) if "adapter_up" in n else t for n, t in one.tensors.items()}
        family.append((one, replace(one, tensors=silent)))
    observed = {}
    for name, shared in (("bare", False), ("shared", True)):
        groups = [(quiet if name == "bare" else one).neurons() for one, quiet in family]
        calibration = Calibration(
            backbone=bare, kind=kind, nonlinearity="relu", batches=lambda: batches(), shared=shared
        )
        observed[name] = calibration.observe(groups, ["pre", "post"], 1000)
    same(observed["bare"], observed["shared"])


def test_the_shared_stream_takes_one_pass_and_the_own_ones_take_a_block_each() -> None:
    bare = backbone()
    rows = []
    bare.embeddings.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for shared in (False, True):
        observe(bare, batches(rows=3, count=2), shared=shared)
    assert rows == [6, 6, 3, 3]


class Counter:
    """A hook of somebody else's, which is part of something large."""

    def __init__(self) -> None:
        self.calls = 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a trainer would have been copied")

    def look(self, module: Any, args: Any, output: Any) -> None:
        self.calls += 1


def test_other_hooks_stay_and_their_owners_are_not_copied() -> None:
    bare, counter = backbone(), Counter()
    groups = [source(bare, number).neurons() for number in range(2)]
    bare.encoder.register_forward_hook(counter.look)
    calibration = Calibration(backbone=bare, batches=lambda: batches(count=2), **KIND)
    assert calibration.observe(groups, ["pre"], 1000).tokens == 36 and counter.calls == 2


def test_whole_batches_are_read_until_there_are_enough_tokens() -> None:
    bare = backbone()
    data = batches()  # of 18 tokens each
    taken = []

    def counted() -> Iterator[dict[str, Tensor]]:
        for batch in data:
            taken.append(batch)
            yield batch

    assert observe(bare, counted(), 19).tokens == 36 and len(taken) == 2
    assert observe(bare, data, 36).tokens == 36
    assert observe(bare, data, 10_000).tokens == 72
    assert observe(bare, data, 8, whole=False).tokens == 13  # rows of 7, 6 and 5
    assert observe(bare, data, 14, whole=False).tokens == 18
    assert observe(bare, data, 19, whole=False).tokens == 18 + 7


def test_padding_and_what_the_backbone_does_not_take_change_nothing() -> None:
    bare = backbone()
    data = batches()
    padded = []
    for batch in data:
        more = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()}
        padded.append({**more, "sequences": torch.ones(3), "labels_of_mine": 3})
    same(observe(bare, data), observe(bare, padded))
    unmasked = [{"input_ids": batch["input_ids"]} for batch in data]
    assert observe(bare, unmasked).tokens == 4 * 21


def test_a_backbone_without_token_types_is_not_given_any() -> None:
    llama = backbone("llama")
    typed = [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in batches()]
    assert observe(llama, typed).tokens == 72


def test_a_decoder_that_reads_other_tokens_counts_those() -> None:
    bart = backbone("bart")
    batch = batches(count=1)[0]
    answer = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 0, 0]])
    data = [{**batch, "decoder_input_ids": answer, "decoder_attention_mask": (answer > 0).long()}]
    counts = {site: moments.count for site, moments in observe(bart, data).post.items()}
    assert {count for site, count in counts.items() if site.startswith("decoder.")} == {7}
    assert {count for site, count in counts.items() if site.startswith("encoder.")} == {18}


class Ranks:
    """What ``summed`` of one rank gives, where the others' numbers are known beforehand."""

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor + torch.as_tensor(self.others.pop(0)).to(tensor)


def test_ranks_count_tokens_together_and_one_may_run_out_of_batches() -> None:
    """Rank 1 has one batch of 18 tokens, then none; rank 0 goes on alone."""
    bare = backbone()
    data = batches()
    own, other = observe(bare, data[:3]), observe(bare, data[3:])
    # ranks; tokens and batches of each step; then the moments, site by site
    there = [one.sums() for side in (other.pre, other.post) for one in side.values()]
    told: list[Any] = [1, [18, 1], [0, 0], [0, 0], [0, 0], *(part for parts in there for part in parts)]
    ranks = Ranks(list(told))
    both = observe(bare, data[:3], summed=ranks)
    assert both.tokens == 72 and not ranks.others
    same(both, observe(bare, data))
    # and the other one, which goes on without batches of its own
    there = [one.sums() for side in (own.pre, own.post) for one in side.values()]
    ranks = Ranks([1, [18, 1], [18, 1], [18, 1], [0, 0], *(part for parts in there for part in parts)])
    again = observe(bare, data[3:], summed=ranks)
    assert again.tokens == 72 and not ranks.others
    same(again, both)


def test_enough_tokens_over_all_ranks_are_enough() -> None:
    bare = backbone()
    double: Callable[[Tensor], Tensor] = lambda tensor: tensor * 2  # noqa: E731  a second rank with the same batches
    found = observe(bare, batches(), 36, summed=double)
    assert found.tokens == 36 and next(iter(found.post.values())).count == 36
    same(found, observe(bare, batches(count=1)))
    assert observe(bare, batches(), 14, whole=False, summed=double).tokens == 14  # a row of 7 on each


def test_no_token_is_an_error() -> None:
    bare = backbone()
    padding = [{name: torch.zeros_like(tensor) for name, tensor in batch.items()} for batch in batches()]
    for data in ([], padding):
        with pytest.raises(UsageError, match="there are no activations"):
            observe(bare, data)


def test_bfloat16_backbones_and_fp64_sums() -> None:
    bare = backbone()
    exact = observe(bare, batches())
    half = observe(bare.to(torch.bfloat16), batches())
    assert next(iter(half.post.values())).second().dtype == torch.float64
    for site in exact.post:
        assert_close(half.post[site].second(), exact.post[site].second(), rtol=0.2, atol=0.1)


@pytest.mark.gpu
def test_on_a_gpu_the_moments_are_the_same() -> None:
    bare = backbone()
    on_cpu = observe(bare, batches())
    same(observe(bare.cuda(), batches()), on_cpu)
