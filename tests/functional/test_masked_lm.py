"""The fused loss equals the plain one in value and every gradient, however it is cut, and its logits stay small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning.functional import masked_lm
from peft_lightning.functional.masked_lm import hidden_divergence, masked_lm_loss, target_scores

N, D, V = 13, 6, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = ((N, D), (N, D), (V, D), (V,))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes], torch.randint(0, V, (N,))


def plain(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, y: Tensor, factors: Any, detach: bool
) -> Tensor:
    s, t = F.linear(student, weight, bias), F.linear(teacher, weight, bias)
    target = (t.detach() if detach else t).softmax(-1)
    divergence = (target * (target.log() - s.log_softmax(-1))).sum(-1).mean()
    return factors[0] * F.cross_entropy(s, y) + factors[1] * F.cross_entropy(t, y) + factors[2] * divergence


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("factors", [(0.5, 0.5, 0.05), (1.0, 0.0, 2.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_value_and_every_gradient(factors: tuple[float, float, float], detach: bool, chunk: int) -> None:
    tensors, y = inputs()
    student, teacher, weight, bias = tensors
    found = masked_lm_loss(student, teacher, weight, bias, y, factors=factors, detach=detach, chunk=chunk)
    expected = plain(student, teacher, weight, bias, y, factors, detach)
    assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    # the loss is scaled by what comes after it
    got = torch.autograd.grad(found.loss * 3, tensors, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(expected * 3, tensors, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-10, atol=1e-12)


def test_parts_and_one_pass_alone() -> None:
    tensors, y = inputs()
    student, teacher, weight, bias = tensors
    s, t = F.linear(student, weight, bias), F.linear(teacher, weight, bias)
    found = masked_lm_loss(student, teacher, weight, bias, y, factors=(0.5, 0.5, 0.05))
    assert_close(found.token_losses, F.cross_entropy(s, y, reduction="none"))
    assert_close(found.student, F.cross_entropy(s, y))
    assert_close(found.teacher, F.cross_entropy(t, y))
    assert_close(found.divergence, F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    assert not any(part.requires_grad for part in found[1:])
    alone = masked_lm_loss(student, None, weight, bias, y)
    assert_close(alone.loss, F.cross_entropy(s, y))
    assert alone.teacher == 0 and alone.divergence == 0
    alone.loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_low_precision_keeps_losses_in_float32() -> None:
    tensors, y = inputs(torch.float32)
    exact = masked_lm_loss(tensors[0], None, tensors[2], tensors[3], y)
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_lm_loss(tensors[0].bfloat16(), None, tensors[2], tensors[3], y)
    assert found.loss.dtype == found.token_losses.dtype == torch.float32
    assert_close(found.loss, exact.loss, rtol=2e-2, atol=2e-2)
    found.loss.backward()
    assert tensors[2].grad is not None and tensors[2].grad.dtype == torch.float32


def test_no_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, y = inputs()
    rows: list[int] = []
    slopes = masked_lm._slopes

    def watched(logs: Any, *rest: Any) -> Any:
        rows.append(len(logs[0]))
        return slopes(logs, *rest)

    monkeypatch.setattr(masked_lm, "_slopes", watched)
    student, teacher, weight, bias = tensors
    loss = masked_lm_loss(student, teacher, weight, bias, y, factors=(0.5, 0.5, 0.05), chunk=4).loss
    assert rows == [4, 4, 4, 1]
    saved = [t.shape for t in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert (N, V) not in saved and (4, V) not in saved


@pytest.mark.parametrize("detach", [True, False])
def test_hidden_divergence(detach: bool) -> None:
    torch.manual_seed(1)
    teacher, student = (torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = hidden_divergence(teacher, student, detach=detach)
    p = (teacher.detach() if detach else teacher).softmax(-1)
    expected = (p * (p.log() - student.softmax(-1).log())).sum(-1).mean()
    assert_close(found, expected)
    got = torch.autograd.grad(found, [student, teacher], allow_unused=True)
    want = torch.autograd.grad(expected, [student, teacher], allow_unused=True)
    assert (got[1] is None) == detach
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    assert hidden_divergence(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32


def test_target_scores() -> None:
    tensors, y = inputs(torch.float32)
    logits = F.linear(tensors[0], tensors[2], tensors[3])
    losses, right = target_scores(tensors[0], tensors[2], tensors[3], y, chunk=4)
    assert_close(losses, F.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(right, logits.argmax(-1) == y)
