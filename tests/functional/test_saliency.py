"""Scores against slow oracles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.functional.saliency import magnitude, snip
from tests.reference.masks import finite_difference_snip


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


def test_scores_are_fp32_even_for_bf16_weights() -> None:
    weight = torch.tensor([3e-20, -2e-20], dtype=torch.bfloat16)
    assert magnitude(weight).dtype == torch.float32
    score = snip(weight, weight)
    assert score.dtype == torch.float32
    assert score.unique().numel() == 2  # the product would underflow or tie in half precision


def test_magnitude_ignores_the_sign() -> None:
    assert_close(magnitude(torch.tensor([-2.0, 1.0])), torch.tensor([2.0, 1.0]))
