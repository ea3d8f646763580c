"""Precision of losses, and weights of classes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from peft_lightning.errors import UsageError
from peft_lightning.tasks.losses import float32, no_weights, weights_for


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_is_raised_and_never_lowered(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert float32(torch.ones(2, dtype=dtype)).dtype == expected


def test_weights_are_those_given_or_ones() -> None:
    outputs = torch.zeros(4, 5, 3, dtype=torch.float64)
    assert_close(weights_for(outputs, None), torch.ones(3, dtype=torch.float64))
    assert_close(weights_for(outputs, torch.tensor([1.0, 2.0, 3.0])), torch.tensor([1.0, 2.0, 3.0]).double())


def test_weights_are_refused() -> None:
    no_weights(None, "span")
    with pytest.raises(UsageError, match="class_weights is set; allowed for kind span: null"):
        no_weights(torch.ones(2), "span")
