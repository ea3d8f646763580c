"""The peak of a process follows what it allocates."""

from __future__ import annotations

import torch

from peft_lightning.study.memory import peak_bytes, reset_peak


def test_peak_sees_an_allocation() -> None:
    reset_peak()
    before = peak_bytes()
    block = torch.ones(64 * 2**20 // 4)
    assert peak_bytes() >= before + block.nbytes // 2
