"""The classification head, on the token that stands for a text, the first of what it is given, or on every token.

``dense`` is the head of BERT's fine-tuning (https://arxiv.org/abs/1810.04805) and of RoBERTa:
``out(drop(tanh(dense(drop(h_0)))))``; ``linear`` is ``out(drop(h_0))``. The weights come from N(0, 0.02), as
BERT's do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_lightning.errors import UsageError

_STYLES = ("dense", "linear")


class ClassificationHead(nn.Module):
    """Map tokens' states to logits, in the dtype of its own weights, whatever the backbone computes in.

    Args:
        hidden_size: width H of the backbone.
        num_outputs: number C of logits.
        style: ``dense`` (dense, tanh, linear) or ``linear``.
        dropout: probability before each of the linear maps.
        per_token: whether it reads every token's state, or the first one's.

    Raises:
        UsageError: ``style`` is neither of the two, or ``dropout`` is outside [0, 1).
    """

    def __init__(self, hidden_size: int, num_outputs: int, style: str, dropout: float, per_token: bool = False) -> None:
        super().__init__()
        if style not in _STYLES:
            raise UsageError(f"head is {style!r}; allowed: {', '.join(_STYLES)}")
        if not 0 <= dropout < 1:
            raise UsageError(f"head_dropout is {dropout}; allowed: 0 <= head_dropout < 1")
        self.per_token = per_token
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(hidden_size, hidden_size) if style == "dense" else None
        self.out = nn.Linear(hidden_size, num_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 0.02) and set the biases to 0."""
        for linear in (self.dense, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, C], or [B, L, C], in the weights' dtype, for ``hidden`` [B, L, H] of any dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            state = (hidden if self.per_token else hidden[:, 0]).to(self.out.weight.dtype)
            if self.dense is not None:
                state = torch.tanh(self.dense(self.dropout(state)))
            return self.out(self.dropout(state))
