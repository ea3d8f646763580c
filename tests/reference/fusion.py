"""AdapterFusion token by token, from its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def fused(input_BLD: Tensor, adapters: Sequence[Any], fusion: Any) -> Tensor:
    """The sum of the adapters' updates, weighted by attention."""
    rows = []
    for text in input_BLD:
        tokens = []
        for x in text:
            updates = [adapter(x[None, None])[0, 0] - x for adapter in adapters]
            query = fusion.query.weight @ x + fusion.query.bias
            scores = [(query @ (fusion.key.weight @ u + fusion.key.bias)).item() for u in updates]
            powers = torch.tensor([s - max(scores) for s in scores], dtype=x.dtype).exp()
            values = [fusion.value.weight @ u for u in updates]
            tokens.append(sum(power / powers.sum() * value for power, value in zip(powers, values, strict=True)))
        rows.append(torch.stack([torch.as_tensor(token) for token in tokens]))
    return torch.stack(rows)
