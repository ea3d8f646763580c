"""Scores against slow oracles."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.functional.saliency import fill_zeros_, grasp, magnitude, random_scores, snip
from tests.reference.masks import finite_difference_flow, finite_difference_snip


def test_snip_is_the_slope_of_the_loss_along_each_mask_entry() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (6,))
    weights = {
        "down": torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
        "up": torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
    }

    def loss(masks: Mapping[str, Tensor]) -> Tensor:
        hidden = torch.tanh(x @ (weights["down"] * masks["down"]).T)
        return F.cross_entropy(hidden @ (weights["up"] * masks["up"]).T, y)

    ones = {name: torch.ones_like(w) for name, w in weights.items()}
    gradients = dict(zip(weights, torch.autograd.grad(loss(ones), list(weights.values())), strict=True))
    expected = finite_difference_snip(loss, ones)
    for name, weight in weights.items():
        assert_close(snip(weight, gradients[name]).double(), expected[name], rtol=1e-4, atol=1e-7)


def test_grasp_is_the_slope_of_the_gradients_norm_along_each_mask_entry() -> None:
    """Halved, d|g|^2/dm where the gradient is that with respect to the weights."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64)

    def loss(point: Mapping[str, Tensor]) -> Tensor:
        return (torch.tanh(x @ point["w"]) - y).square().mean()

    flow = finite_difference_flow(loss, {"w": weight})["w"]
    slopes = []
    for i in range(4):
        norms = []
        for sign in (1, -1):
            moved = weight.clone()
            moved[i] *= 1 + sign * 1e-5
            moved.requires_grad_()
            (g,) = torch.autograd.grad(loss({"w": moved}), moved)
            norms.append(float(g.square().sum()))
        slopes.append((norms[0] - norms[1]) / 2e-5 / 2)
    assert_close(grasp(weight, flow).double(), torch.tensor(slopes, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_random_scores_are_uniform_and_depend_on_the_seed_only() -> None:
    weights = {"a": torch.zeros(100, 50, dtype=torch.bfloat16), "b": torch.ones(7)}
    scores, again, other = (random_scores(weights, seed) for seed in (1, 1, 2))
    assert_close(scores, again, rtol=0, atol=0)
    assert not torch.equal(scores["a"], other["a"])
    assert {name: (z.shape, z.dtype) for name, z in scores.items()} == {
        name: (w.shape, torch.float32) for name, w in weights.items()
    }
    counts = torch.histc(scores["a"], bins=10, min=0, max=1)
    assert counts.sum() == 5000  # all lie in [0, 1]
    assert (counts - 500).abs().max() < 5 * 450**0.5  # five standard deviations


def test_random_scores_are_the_same_on_every_device(device: str) -> None:
    scores = random_scores({"a": torch.zeros(5, 5, device=device)}, 3)["a"]
    assert scores.device.type == device
    assert torch.equal(scores.cpu(), random_scores({"a": torch.zeros(5, 5)}, 3)["a"])


def test_scores_are_fp32_even_for_bf16_weights() -> None:
    weight = torch.tensor([3e-20, -2e-20], dtype=torch.bfloat16)
    assert magnitude(weight).dtype == torch.float32
    for score in (snip(weight, weight), grasp(weight, weight)):
        assert score.dtype == torch.float32
        assert score.unique().numel() == 2  # the product would underflow or tie in half precision


def test_magnitude_ignores_the_sign() -> None:
    assert_close(magnitude(torch.tensor([-2.0, 1.0])), torch.tensor([2.0, 1.0]))


def test_only_tensors_of_zeros_are_filled_with_the_given_spread() -> None:
    weights = {"a": torch.ones(3), "zero": torch.zeros(200, 200), "half": torch.tensor([0.0, 1.0])}
    fill_zeros_(weights, std=0.3, seed=1)
    assert torch.equal(weights["a"], torch.ones(3)) and torch.equal(weights["half"], torch.tensor([0.0, 1.0]))
    assert weights["zero"].std().item() == pytest.approx(0.3, rel=0.02) and abs(weights["zero"].mean()) < 0.01
    again = {"zero": torch.zeros(200, 200)}
    fill_zeros_(again, std=0.3, seed=1)
    assert torch.equal(again["zero"], weights["zero"])
