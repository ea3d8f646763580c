"""Second derivatives inside the context equal torch's own and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.functional.twice import twice_differentiable


def _slopes(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative of an elementwise function."""
    y = function(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y, first, torch.autograd.grad((first * first.detach()).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [F.gelu, nn.GELU(), nn.GELU("tanh"), lambda x: F.gelu(input=x)])
def test_gelu_and_its_derivatives_stay_what_they_were(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str
) -> None:
    x = torch.linspace(-6, 6, 101, dtype=dtype, device=device, requires_grad=True)
    expected = _slopes(function, x)
    with twice_differentiable():
        assert_close(_slopes(function, x), expected)


def test_gelu_by_finite_differences() -> None:
    x = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    with twice_differentiable():
        assert gradcheck(F.gelu, x)
        assert gradgradcheck(F.gelu, x)


def test_the_own_gelu_is_used_inside_only() -> None:
    x = torch.ones(3, requires_grad=True)
    with twice_differentiable():
        assert "_Gelu" in str(F.gelu(x).grad_fn)
    assert "_Gelu" not in str(F.gelu(x).grad_fn)


def test_gelu_computes_in_half_precision() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.bfloat16, requires_grad=True)
    with twice_differentiable():
        assert {part.dtype for part in _slopes(F.gelu, x)} == {torch.bfloat16}


def test_attention_has_a_second_derivative_inside_only() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 3, 4, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(RuntimeError, match="not implemented"):
        _slopes(attend, q)
    with twice_differentiable():
        assert _slopes(attend, q)[2].abs().sum() > 0
