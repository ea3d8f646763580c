"""Cross-entropy and self-distillation over a vocabulary, without ever holding all logits (SCTD, equation 4).

With logits s = W h + b of the student and t = W h' + b of the teacher, N targets y and factors a, a', c:

    loss = 1/N sum_n  a CE(s_n, y_n) + a' CE(t_n, y_n) + c KL(p(t_n) || p(s_n))

The loss is a sum whose factors are known beforehand, so its gradients can be made in the forward pass, one chunk of
rows after the other; the backward pass scales them. A few tensors of one chunk's logits are alive at a time, and no
product is computed twice. Softmax and losses are in fp32 (fp64 for fp64 inputs), products in the dtype of ``h``.

Shapes: N targets, D width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["MaskedLM", "hidden_divergence", "masked_lm_loss", "target_scores"]


class MaskedLM(NamedTuple):
    """A loss and its parts.

    Attributes:
        loss: scalar, has gradients.
        token_losses: ``[N]`` cross-entropy of the student, detached.
        student: its mean, detached.
        teacher: mean cross-entropy of the teacher, detached; 0 without one.
        divergence: mean KL, detached; 0 without a teacher.
    """

    loss: Tensor
    token_losses: Tensor
    student: Tensor
    teacher: Tensor
    divergence: Tensor


def masked_lm_loss(
    student_ND: Tensor,
    teacher_ND: Tensor | None,
    weight_VD: Tensor,
    bias_V: Tensor,
    labels_N: Tensor,
    *,
    factors: tuple[float, float, float] = (1.0, 0.0, 0.0),
    detach: bool = True,
    chunk: int = 1024,
) -> MaskedLM:
    """The loss above.

    Args:
        student_ND: inputs of the output layer at the targets.
        teacher_ND: the same of the full pass, or None.
        weight_VD: the output layer.
        bias_V: its bias.
        labels_N: int64.
        factors: a, a', c.
        detach: whether the KL sends no gradient into the teacher.
        chunk: C.
    """
    loss, token_losses, parts = _Fused.apply(
        student_ND, teacher_ND, weight_VD, bias_V, labels_N, factors, detach, chunk
    )
    return MaskedLM(loss, token_losses, *parts.unbind())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        teacher_ND: Tensor | None,
        weight_VD: Tensor,
        bias_V: Tensor,
        labels_N: Tensor,
        factors: tuple[float, float, float],
        detach: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(student_ND.dtype, torch.float32)
        weight, bias = weight_VD.to(student_ND.dtype), bias_V.to(dtype)
        learns = teacher_ND is not None and (factors[1] != 0 or not detach)
        grads = [torch.zeros_like(student_ND), torch.zeros_like(teacher_ND) if learns else None]  # type: ignore[arg-type]
        grad_weight = torch.zeros(weight_VD.shape, dtype=dtype, device=weight_VD.device)
        grad_bias = torch.zeros_like(bias)
        token_losses = torch.empty(len(labels_N), dtype=dtype, device=labels_N.device)
        parts = torch.zeros(3, dtype=dtype, device=labels_N.device)
        count = len(labels_N)
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            hidden = [student_ND[rows], None if teacher_ND is None else teacher_ND[rows]]
            logs = [None if h is None else (F.linear(h, weight).to(dtype) + bias).log_softmax(-1) for h in hidden]
            slopes, values, losses = _slopes(logs, labels_N[rows], factors, detach)
            token_losses[rows] = losses
            parts += values
            for h, slope, grad in zip(hidden, slopes, grads, strict=True):
                if h is None or slope is None or grad is None:
                    continue
                grad_bias += slope.sum(0)
                slope = slope.to(h.dtype)
                grad[rows] = slope @ weight
                grad_weight += slope.t() @ h
        parts /= count
        ctx.save_for_backward(*(g for g in (*grads, grad_weight, grad_bias) if g is not None))
        ctx.learns, ctx.count = learns, count
        ctx.dtypes = weight_VD.dtype, bias_V.dtype
        loss = parts[0] * factors[0] + parts[1] * factors[1] + parts[2] * factors[2]
        ctx.mark_non_differentiable(token_losses, parts)
        return loss, token_losses, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
        saved = list(ctx.saved_tensors)
        factor = gradient / ctx.count
        student = saved.pop(0) * factor.to(saved[0].dtype)
        teacher = saved.pop(0) * factor.to(student.dtype) if ctx.learns else None
        grad_weight, grad_bias = saved
        return (
            student,
            teacher,
            (grad_weight * factor).to(ctx.dtypes[0]),
            (grad_bias * factor).to(ctx.dtypes[1]),
            *(None,) * 4,
        )


def _slopes(
    logs: list[Tensor | None], labels_C: Tensor, factors: tuple[float, float, float], detach: bool
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Derivatives of the sums by both logits ``[C, V]``, the three sums, and the student's losses ``[C]``."""
    student, teacher = logs
    assert student is not None
    a, a_teacher, c = factors
    index = labels_C.unsqueeze(1)
    losses_C = -student.gather(1, index).squeeze(1)
    p_student = student.exp()
    slope = p_student * (a + (c if teacher is not None else 0.0))
    slope.scatter_add_(1, index, torch.full_like(index, -a, dtype=slope.dtype))
    zero = losses_C.new_zeros(())
    if teacher is None:
        return [slope, None], torch.stack([losses_C.sum(), zero, zero]), losses_C
    p_teacher = teacher.exp()
    slope -= c * p_teacher
    gap_CV = teacher - student
    divergence_C = (p_teacher * gap_CV).sum(-1)
    slope_teacher = a_teacher * p_teacher
    slope_teacher.scatter_add_(1, index, torch.full_like(index, -a_teacher, dtype=slope.dtype))
    if not detach:
        slope_teacher += c * p_teacher * (gap_CV - divergence_C.unsqueeze(1))
    teacher_sum = -teacher.gather(1, index).sum()
    return [slope, slope_teacher], torch.stack([losses_C.sum(), teacher_sum, divergence_C.sum()]), losses_C


def hidden_divergence(teacher_BKD: Tensor, student_BKD: Tensor, *, detach: bool = True) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the width, in fp32, the mean over tokens.

    Args:
        teacher_BKD: hidden states of the full pass.
        student_BKD: those of the same tokens in the other pass.
        detach: whether no gradient goes into the teacher.
    """
    dtype = torch.promote_types(student_BKD.dtype, torch.float32)
    target = teacher_BKD.detach() if detach else teacher_BKD
    logs_teacher, logs_student = (x.to(dtype).log_softmax(-1).flatten(0, -2) for x in (target, student_BKD))
    return F.kl_div(logs_student, logs_teacher, reduction="batchmean", log_target=True)


def target_scores(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_N: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target, fp32 ``[N]``, and whether its word has the highest score, bool ``[N]``.

    Made for evaluation: no gradients, and logits of ``chunk`` rows at a time.
    """
    losses, right = [], []
    for hidden_CD, labels_C in zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True):
        logits_CV = F.linear(hidden_CD, weight_VD.to(hidden_CD.dtype)).float() + bias_V.float()
        losses.append(F.cross_entropy(logits_CV, labels_C, reduction="none"))
        right.append(logits_CV.argmax(-1) == labels_C)
    return torch.cat(losses), torch.cat(right)
