"""Gates change nothing and get per-example slopes; the normalisation is equation 2."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.functional.heads import gate_units, normalise, rank_correlation
from peft_lightning.functional.sparsify import DegenerateScoreError
from tests.reference.importance import figure_1


@pytest.mark.parametrize("units", [1, 3, 12])
def test_gates_are_those_that_multiply(units: int) -> None:
    torch.manual_seed(0)
    value = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    gates = torch.ones(4, units, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, 5, 12, dtype=torch.float64)
    plain = value * gates.repeat_interleave(12 // units, dim=1)[:, None]
    assert_close(gate_units(value, gates), plain)
    wanted = torch.autograd.grad((plain.sin() * direction).sum(), [value, gates])
    got = torch.autograd.grad((gate_units(value, gates).sin() * direction).sum(), [value, gates])
    assert_close(got, wanted)


def test_a_second_derivative_is_refused() -> None:
    value, gates = torch.randn(1, 2, 4, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(gate_units(value, gates).square().sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@given(
    rows=st.lists(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), min_size=2, max_size=5),
    norm=st.sampled_from(["layer", "all"]),
)
def test_equation_2(rows: list[list[float]], norm: str) -> None:
    raw = {str(number): torch.tensor(row, dtype=torch.float64) for number, row in enumerate(rows)}
    expected, spread = figure_1(rows, norm == "layer")
    if spread <= 1e-9:
        with pytest.raises(DegenerateScoreError, match="have the same"):
            normalise(raw, norm)
        return
    got = normalise(raw, norm)
    for number, row in enumerate(expected):
        assert_close(got[str(number)], torch.tensor(row, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_the_norm_over_all_keeps_the_order_and_the_layers_norm_does_not() -> None:
    raw = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 90.0])}
    order = torch.cat(list(raw.values())).argsort()
    assert torch.equal(torch.cat(list(normalise(raw, "all").values())).argsort(), order)
    assert torch.cat(list(normalise(raw, "layer").values())).argsort().tolist() == [2, 0, 1, 3]


def test_a_layer_without_units_is_no_trouble() -> None:
    got = normalise({"a": torch.empty(0), "b": torch.tensor([1.0, 3.0])}, "layer")
    assert len(got["a"]) == 0 and got["b"].tolist() == [0.0, 1.0]


def test_what_ranks_nothing_is_an_error() -> None:
    with pytest.raises(DegenerateScoreError, match="all 4 units have the same"):
        normalise({"a": torch.ones(2), "b": torch.ones(2)}, "all")
    with pytest.raises(DegenerateScoreError, match="all 2 units have the same"):
        normalise({"a": torch.zeros(2)}, "layer")
    for value in (float("nan"), float("inf")):
        with pytest.raises(DegenerateScoreError, match="is not finite"):
            normalise({"a": torch.tensor([1.0, value])}, "layer")
    with pytest.raises(UsageError, match=r"importance\.norm = 'l1': must be one of layer, all"):
        normalise({"a": torch.ones(2)}, "l1")
    with pytest.raises(UsageError, match="no unit to rank"):
        normalise({}, "layer")


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    one, other = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    if len(set(one.tolist())) == 1 or len(set(other.tolist())) == 1:
        assert rank_correlation(one, other) != rank_correlation(one, other)  # NaN
        return
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)


def test_correlation_needs_pairs() -> None:
    with pytest.raises(UsageError, match="must be equal, of two units or more"):
        rank_correlation(torch.ones(3), torch.ones(2))
