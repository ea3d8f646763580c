"""Differences are listed both ways."""

from __future__ import annotations

import pytest
import torch

from peft_lightning.errors import CheckpointError
from peft_lightning.files.strict import check_fingerprint, check_tensors


def test_differences_are_listed_both_ways() -> None:
    given = {"x": torch.zeros(2), "extra": torch.zeros(1), "d": torch.zeros(1, dtype=torch.float64)}
    expected = {"x": torch.zeros(3), "absent": torch.zeros(1), "d": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(given, expected, "file")
    message = str(caught.value)
    assert "missing 1: absent" in message and "unexpected 1: extra" in message
    assert "x ((2,) torch.float32, expected (3,) torch.float32)" in message
    assert "d ((1,) torch.float64" in message
    check_tensors(expected, expected, "file")


def test_another_backbone() -> None:
    one = {"model_type": "bert", "hidden_size": 64, "weights": "aa"}
    check_fingerprint(one, one, "file")
    with pytest.raises(CheckpointError, match="another backbone.*hidden_size 32 here 64"):
        check_fingerprint({**one, "hidden_size": 32}, one, "file")
    with pytest.raises(CheckpointError, match="same shape with other weights"):
        check_fingerprint({**one, "weights": "bb"}, one, "file")
    with pytest.raises(CheckpointError, match="another backbone"):
        check_fingerprint(None, one, "file")
