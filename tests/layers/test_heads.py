"""The classification head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.layers.heads import ClassificationHead


def by_hand(head: ClassificationHead, hidden: Tensor) -> Tensor:
    """The head without dropout, one example and one output at a time."""
    rows = []
    for states in hidden.float():
        state = states[0]
        if head.dense is not None:
            state = torch.stack(
                [(state * w).sum() + b for w, b in zip(head.dense.weight, head.dense.bias, strict=True)]
            ).tanh()
        outputs = zip(head.out.weight, head.out.bias, strict=True)
        rows.append(torch.stack([(state * w).sum() + b for w, b in outputs]))
    return torch.stack(rows)


@pytest.mark.parametrize("style", ["dense", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_by_hand_in_float32(style: str, dtype: torch.dtype) -> None:
    head = ClassificationHead(16, 3, style, 0.5).eval()
    hidden = torch.randn(4, 5, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
    assert logits.dtype == torch.float32
    assert_close(logits, by_hand(head, hidden))


def test_a_head_in_another_dtype_stays_in_it() -> None:
    head = ClassificationHead(16, 3, "dense", 0.0).double()
    assert head(torch.randn(2, 5, 16)).dtype == torch.float64


def test_only_the_first_token_is_read() -> None:
    head = ClassificationHead(16, 3, "dense", 0.0)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    head(hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 0].abs().min() > 0
    assert hidden.grad[:, 1:].abs().max() == 0


def test_initial_weights() -> None:
    torch.manual_seed(0)
    head = ClassificationHead(256, 64, "dense", 0.0)
    assert head.dense is not None
    for linear in (head.dense, head.out):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.weight.mean().item() == pytest.approx(0.0, abs=1e-3)
        assert not linear.bias.any()


def test_styles_differ_in_their_parameters() -> None:
    names = {style: set(ClassificationHead(8, 2, style, 0.0).state_dict()) for style in ("dense", "linear")}
    assert names["linear"] == {"out.weight", "out.bias"}
    assert names["dense"] == names["linear"] | {"dense.weight", "dense.bias"}


@pytest.mark.parametrize(("style", "linears"), [("dense", 2), ("linear", 1)])
def test_dropout_comes_before_each_linear_map(style: str, linears: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ClassificationHead(8, 2, style, 0.25)
    seen = []

    def forward(state: Tensor) -> Tensor:
        seen.append(state.dtype)
        return state

    monkeypatch.setattr(head.dropout, "forward", forward)
    head(torch.randn(3, 4, 8, dtype=torch.bfloat16))
    assert seen == [torch.float32] * linears
    assert head.dropout.p == 0.25


@pytest.mark.parametrize(
    ("style", "dropout", "message"),
    [
        ("pooled", 0.1, "head is 'pooled'; allowed: dense, linear"),
        ("dense", 1.0, "head_dropout is 1.0; allowed: 0 <= head_dropout < 1"),
        ("dense", -0.1, "head_dropout is -0.1; allowed: 0 <= head_dropout < 1"),
    ],
)
def test_wrong_options(style: str, dropout: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ClassificationHead(8, 2, style, dropout)
