"""The best spans of passages that are read in windows.

A span goes from one token to the same or a later one. Its score is what its first token scores as a start plus what
its last token scores as an end: ``score(i, j) = s_i + e_j``, ``i <= j < i + A``.

Shapes: B questions, N windows of all of them, W windows of the question that has most, L tokens of a window, A tokens
of the longest span allowed, K spans kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lightning.functional.sequences import row_of_sequence

__all__ = ["Spans", "best_spans", "from_rows", "to_rows"]


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The best spans of each question, the best one first; all [B, K].

    Args:
        scores: -inf where a question has fewer spans; then the rest means nothing.
        windows: number of the window in the batch, int64.
        first: the span's first token in it, int64.
        last: its last one, int64.
    """

    scores: Tensor
    windows: Tensor
    first: Tensor
    last: Tensor


def best_spans(scores: Tensor, inside: Tensor, inputs: Mapping[str, Tensor], longest: int, count: int) -> Spans:
    """Return the ``count`` best spans of each question, over all its windows.

    Args:
        scores: [N, L, 2], of each token as a start and as an end.
        inside: bool [N, L], whether a token belongs to the passage.
        inputs: of a batch; ``sequences`` int64 [B] says how many windows each question has.
        longest: A.
        count: K, or as many as there are at most.
    """
    start_NL, end_NL = scores.masked_fill(~inside.unsqueeze(-1), -torch.inf).unbind(-1)
    width = min(longest, scores.shape[1])
    end_NLA = F.pad(end_NL, (0, width - 1), value=-torch.inf).unfold(1, width, 1)
    sums_NS = (start_NL.unsqueeze(2) + end_NLA).flatten(1)
    score_NK, place_NK = sums_NS.topk(min(count, sums_NS.shape[1]), dim=1)

    score_BS = to_rows(score_NK, inputs, -torch.inf).flatten(1)
    score_BK, rank_BK = score_BS.topk(min(count, score_BS.shape[1]), dim=1)
    per_window, counts_B = score_NK.shape[1], inputs["sequences"]
    window_BK = rank_BK // per_window + (counts_B.cumsum(0) - counts_B).unsqueeze(1)
    window_BK = window_BK.clamp(max=len(scores) - 1)  # where the question has fewer windows than the batch's widest
    place_BK = place_NK[window_BK, rank_BK % per_window]
    first_BK = place_BK // width
    last_BK = (first_BK + place_BK % width).clamp(max=scores.shape[1] - 1)
    return Spans(scores=score_BK, windows=window_BK, first=first_BK, last=last_BK)


def to_rows(values: Tensor, inputs: Mapping[str, Tensor], fill: float) -> Tensor:
    """Return values [N, ...] of windows as [B, W, ...], ``fill`` where a row has fewer than W.

    >>> to_rows(torch.tensor([1, 2, 3]), {"sequences": torch.tensor([1, 2])}, 0)
    tensor([[1, 0],
            [2, 3]])
    """
    row_N, place_N = _places(inputs)
    counts_B = inputs["sequences"]
    result = values.new_full((len(counts_B), int(counts_B.max()), *values.shape[1:]), fill)
    result[row_N, place_N] = values
    return result


def from_rows(values: Tensor, inputs: Mapping[str, Tensor], each: int) -> Tensor:
    """Return the ``each`` numbers [N, each] of every window, from [B, W * each or more], where they lie end to end.

    >>> from_rows(torch.tensor([[1, 0], [2, 3]]), {"sequences": torch.tensor([1, 2])}, 1).tolist()
    [[1], [2], [3]]
    """
    row_N, place_N = _places(inputs)
    place_NE = place_N.unsqueeze(1) * each + torch.arange(each, device=place_N.device)
    return values[row_N.unsqueeze(1), place_NE]


def _places(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Each window's row, and its number among the row's: int64 [N] both."""
    counts_B = inputs["sequences"]
    row_N = row_of_sequence(inputs)
    assert row_N is not None
    first_B = counts_B.cumsum(0) - counts_B
    return row_N, torch.arange(len(row_N), device=row_N.device) - first_B[row_N]
