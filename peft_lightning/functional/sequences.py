"""Rows of a batch that are several sequences, which lie side by side (multiple choice, windows of a long passage).

Shapes: B rows, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["row_of_sequence", "sum_by_row"]


def row_of_sequence(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Number of the row that each sequence belongs to, int64 [N].

    Args:
        inputs: of a batch; ``sequences`` int64 [B] says how many each row has.

    Returns:
        None where there is no such entry: each row is one sequence.
    """
    counts_B = inputs.get("sequences")
    if counts_B is None:
        return None
    return torch.repeat_interleave(torch.arange(len(counts_B), device=counts_B.device), counts_B)


def sum_by_row(values: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Sums [B, ...] over each row's sequences, of values [N, ...]."""
    rows_N = row_of_sequence(inputs)
    if rows_N is None:
        return values
    return values.new_zeros(len(inputs["sequences"]), *values.shape[1:]).index_add(0, rows_N, values)
