"""The refit is the least-squares solution; select keeps the strongest neurons; errors are those of the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.moments import Moments
from peft_lightning.functional.neurons import Bottleneck
from peft_lightning.functional.repairing import output_error, refit, select
from tests.reference.merging import inner, output, ridge_fit

WIDTH, SIZE = 9, 5
OUTPUTS = [0.5, 1.5, -0.25]


def _adapter(seed: int, size: int = SIZE, scaling: float = 1.0) -> Bottleneck:
    g = torch.Generator().manual_seed(seed)
    shapes = ((size, WIDTH), (size,), (WIDTH, size), (WIDTH,))
    down, bias, up, up_bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return Bottleneck(down, bias, up, up_bias, scaling)


SOURCES = [_adapter(1), _adapter(2, 7, 3.0), _adapter(3)]
INPUTS = torch.randn(80, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _moments(adapters: Sequence[Bottleneck], inputs: Tensor = INPUTS) -> Moments:
    moments = Moments([adapter.size for adapter in adapters])
    moments.add([inner(adapter, inputs).relu() for adapter in adapters])
    return moments


def _target(sources: Sequence[Bottleneck] = SOURCES, outputs: Sequence[float] = OUTPUTS) -> Tensor:
    parts = [v * output(source, INPUTS) for source, v in zip(sources, outputs, strict=True)]
    return torch.stack(parts).sum(0)


def _masked(adapter: Bottleneck, seed: int = 4) -> Bottleneck:
    g = torch.Generator().manual_seed(seed)
    down = torch.rand(adapter.down_RD.shape, generator=g) < 0.6
    up = torch.rand(adapter.up_DR.shape, generator=g) < 0.6
    up[0] = False  # a row may have no support at all
    return replace(adapter, down_RD=adapter.down_RD * down, up_DR=adapter.up_DR * up, down_mask_RD=down, up_mask_DR=up)


# -- refit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_refit_is_ridge_regression_towards_what_there_was(masked: bool, ridge: float) -> None:
    merged = _masked(_adapter(0)) if masked else _adapter(0)
    got = refit(merged, SOURCES, OUTPUTS, _moments([merged, *SOURCES]), ridge)
    z = inner(merged, INPUTS).relu()
    amount = ridge * float((z - z.mean(0)).square().mean(0).mean())
    wanted = ridge_fit(z, _target(), merged.up_DR, amount, merged.up_mask_DR)
    assert_close(got.up_DR, wanted, atol=1e-8, rtol=1e-6)
    assert_close(output(got, INPUTS).mean(0), _target().mean(0))
    assert_close(got.down_RD, merged.down_RD)


def test_refit_without_a_bias_keeps_the_means() -> None:
    merged = replace(_adapter(0), up_bias_D=None)
    sources = [replace(source, up_bias_D=None) for source in SOURCES]
    got = refit(merged, sources, OUTPUTS, _moments([merged, *sources]), 1e-10)
    assert got.up_bias_D is None
    wanted = torch.linalg.lstsq(inner(merged, INPUTS).relu(), _target(sources)).solution.t()
    assert_close(got.up_DR, wanted, atol=1e-6, rtol=1e-6)


def test_refit_lowers_the_error_and_does_not_move_what_is_right() -> None:
    merged = _adapter(0)
    moments = _moments([merged, *SOURCES])
    before, after = (
        output_error(adapter, SOURCES, OUTPUTS, moments)
        for adapter in (merged, refit(merged, SOURCES, OUTPUTS, moments, 1e-3))
    )
    assert after < 0.9 < before
    right = SOURCES[0]
    moments = _moments([right, *SOURCES[:1]])
    got = refit(right, SOURCES[:1], [1.0], moments, 1e-3)
    assert_close(got.up_DR, right.up_DR, atol=1e-10, rtol=0)


def test_a_neuron_that_is_never_active_keeps_its_output() -> None:
    merged = _adapter(0)
    assert merged.down_bias_R is not None
    low_R = merged.down_bias_R - 99
    merged = replace(merged, down_bias_R=merged.down_bias_R - torch.tensor([0.0, 99.0, 0.0, 0.0, 0.0]))
    got = refit(merged, SOURCES, OUTPUTS, _moments([merged, *SOURCES]), 1e-3)
    assert_close(got.up_DR[:, 1], merged.up_DR[:, 1])
    asleep = replace(merged, down_bias_R=low_R)
    assert refit(asleep, SOURCES, OUTPUTS, _moments([asleep, *SOURCES]), 1e-3) is asleep


# -- select ------------------------------------------------------------------------------------------------------


def test_select_keeps_the_neurons_of_largest_output_energy() -> None:
    sources = [replace(source, up_DR=source.up_DR * source.scaling, scaling=1.0) for source in SOURCES]
    got, chosen = select(sources, OUTPUTS, _moments(sources), 6)
    energies = []
    for source, v in zip(sources, OUTPUTS, strict=True):
        z = inner(source, INPUTS).relu()
        energies += [float((v * z[:, r, None] * source.up_DR[:, r]).square().sum(1).mean()) for r in range(source.size)]
    best = sorted(range(len(energies)), key=lambda q: -energies[q])[:6]
    assert chosen.tolist() == best
    assert_close(got.down_RD, torch.cat([source.down_RD for source in sources])[best])
    weighted = torch.cat([source.up_DR * v for source, v in zip(sources, OUTPUTS, strict=True)], 1)
    assert_close(got.up_DR, weighted[:, best])


def test_all_neurons_and_a_refit_are_all_outputs() -> None:
    sources = [replace(source, up_DR=source.up_DR * source.scaling, scaling=1.0) for source in SOURCES[:2]]
    found, chosen = select(sources, OUTPUTS[:2], _moments(sources), 12)
    got = refit(found, sources, OUTPUTS[:2], _moments(sources), 1e-3, chosen_R=chosen)
    wanted = sum((v * (output(s, INPUTS)) for s, v in zip(sources, OUTPUTS, strict=False)), torch.zeros(80, WIDTH))
    assert_close(output(got, INPUTS), wanted)


def test_the_refit_of_chosen_neurons_is_that_of_their_activations() -> None:
    sources = [replace(source, scaling=1.0) for source in SOURCES]
    moments = _moments(sources)
    found, chosen = select(sources, OUTPUTS, moments, 6)
    got = refit(found, sources, OUTPUTS, moments, 1e-2, chosen_R=chosen)
    wanted = refit(found, sources, OUTPUTS, _moments([found, *sources]), 1e-2)
    assert_close(got.up_DR, wanted.up_DR)
    assert_close(got.up_bias_D, wanted.up_bias_D)


def test_neurons_that_say_the_same_count_once() -> None:
    base = SOURCES[0]
    assert base.down_bias_R is not None
    louder = replace(base, down_RD=base.down_RD * 2, down_bias_R=base.down_bias_R * 2)
    sources = [base, louder, _adapter(5)]
    found, chosen = select(sources, [1.0, 1.0, 1e-3], _moments(sources), SIZE)
    assert sorted(q % SIZE for q in chosen.tolist()) == list(range(SIZE)) and max(chosen.tolist()) < 2 * SIZE
    got = refit(found, sources, [1.0, 1.0, 0.0], _moments(sources), 1e-3, chosen_R=chosen)
    assert_close(output(got, INPUTS), _target(sources, [1.0, 1.0, 0.0]))


@pytest.mark.parametrize("has_bias", [False, True])
def test_each_choice_by_gain_is_the_best_next_one(has_bias: bool) -> None:
    sources = [replace(s, scaling=1.0, up_bias_D=s.up_bias_D if has_bias else None) for s in SOURCES]
    _, chosen = select(sources, OUTPUTS, _moments(sources), 4, choice="gain")
    z, y = torch.cat([inner(source, INPUTS).relu() for source in sources], 1), _target(sources)
    if has_bias:
        z, y = z - z.mean(0), y - y.mean(0)
    taken: list[int] = []
    for _ in range(4):
        left = {}
        for q in range(z.shape[1]):
            if q not in taken:
                columns = z[:, [*taken, q]]
                left[q] = float((y - columns @ torch.linalg.lstsq(columns, y).solution).square().sum())
        taken.append(min(left, key=lambda q: left[q]))
    assert chosen.tolist() == taken


def test_two_of_the_same_are_stronger_than_one() -> None:
    row, column = torch.ones(1, WIDTH, dtype=torch.float64), torch.ones(WIDTH, 1, dtype=torch.float64)
    lone = Bottleneck(-row, None, column, None)
    pair = [Bottleneck(row, None, 0.8 * column, None)] * 2
    inputs = torch.cat([INPUTS, -INPUTS])  # both are equally active
    for sources, wanted in (([lone, *pair], {1, 2}), ([lone, pair[0]], {0})):
        _, chosen = select(sources, [1.0] * len(sources), _moments(sources, inputs), 1)
        assert set(chosen.tolist()) <= wanted


@pytest.mark.parametrize("choice", ["energy", "gain"])
def test_what_is_taken_over_widens_the_mask(choice: str) -> None:
    masks = torch.arange(WIDTH) % 2 == 0, torch.arange(WIDTH) % 2 == 1
    sources = [
        replace(
            SOURCES[0],
            up_DR=SOURCES[0].up_DR * mask[:, None],
            down_mask_RD=torch.ones(SIZE, WIDTH) > 0,
            up_mask_DR=mask[:, None].expand(WIDTH, SIZE),
        )
        for mask in masks
    ]
    found, _ = select(sources, [1.0, 1.0], _moments(sources), SIZE, choice=choice)
    assert found.up_mask_DR is not None and found.up_mask_DR.all()


def test_neurons_that_nearly_say_the_same_do_not_both_stay_by_gain() -> None:
    base = SOURCES[0]
    near = replace(base, down_RD=base.down_RD + 0.2 * _adapter(8).down_RD)
    sources = [base, near]
    error = {}
    for choice in ("energy", "gain"):
        found, chosen = select(sources, [0.5, 0.5], _moments(sources), SIZE, choice=choice)
        got = refit(found, sources, [0.5, 0.5], _moments(sources), 1e-3, chosen_R=chosen)
        wanted = _target(sources, [0.5, 0.5])
        error[choice] = float((output(got, INPUTS) - wanted).norm() / wanted.norm())
    assert error["gain"] < 0.2 and error["gain"] < 0.5 * error["energy"]


@pytest.mark.parametrize("choice", ["energy", "gain"])
@pytest.mark.parametrize("width", [SIZE, 8, 10])
def test_what_goes_leaves_its_output_to_what_says_the_same(choice: str, width: int) -> None:
    sources = [SOURCES[0]] * 2
    found, chosen = select(sources, [1.0, 1.0], _moments(sources), width, choice=choice)
    assert len(set(chosen.tolist())) == width
    assert len({q % SIZE for q in chosen.tolist()[:SIZE]}) == SIZE
    assert_close(output(found, INPUTS), 2 * output(SOURCES[0], INPUTS))


def test_more_neurons_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"merge\.width = 18: must be at most 17, the neurons of all adapters"):
        select(SOURCES, OUTPUTS, _moments(SOURCES), 18)


# -- errors ------------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_outputs() -> None:
    merged = _adapter(0)
    wanted = (output(merged, INPUTS) - _target()).norm() / _target().norm()
    assert output_error(merged, SOURCES, OUTPUTS, _moments([merged, *SOURCES])) == pytest.approx(float(wanted))


def test_the_error_against_nothing() -> None:
    pair = [SOURCES[0], SOURCES[0]]
    moments = _moments([SOURCES[0], *pair])
    assert output_error(SOURCES[0], pair, [0.5, 0.5], moments) == pytest.approx(0, abs=1e-7)
    assert output_error(SOURCES[0], pair, [0.0, 0.0], moments) == float("inf")


def test_moments_of_others() -> None:
    foreign = _moments(SOURCES)
    message = r"moments of \(5, 7, 5\) neurons: must be of \(5, 5, 7, 5\)"
    with pytest.raises(UsageError, match=message):
        refit(_adapter(0), SOURCES, OUTPUTS, foreign, 1e-3)
    with pytest.raises(UsageError, match=message):
        output_error(_adapter(0), SOURCES, OUTPUTS, foreign)
