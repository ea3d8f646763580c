"""Which tokens of a block stay in the middle layers, and how important each word is (Hou et al., 2022).

Importance of a vocabulary id v is a moving average of the masked-language-model loss where v was the answer,

    m_v <- beta m_v + (1 - beta) mean of the losses of v in this step,

over all targets of an optimizer step on all ranks; ids that were no target keep theirs. Of each block the K tokens with
the highest m stay; ties, of which there are many (all copies of a word), are broken by noise.

Shapes: B blocks, S tokens of a block, K kept, D width, V vocabulary, N targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_lightning.errors import UsageError

__all__ = ["gather_tokens", "kept_length", "loss_sums", "scatter_tokens", "select_tokens"]

_MULTIPLE = 8


def kept_length(length: int, ratio: float) -> int:
    """K: ``ratio`` of ``length``, to the nearest multiple of 8, at least one multiple and at most ``length``.

    Raises:
        UsageError: if ``ratio`` lies outside (0, 1].

    >>> kept_length(128, 0.5), kept_length(100, 1.0)
    (64, 100)
    """
    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"drop.keep = {ratio}: must be the share of tokens kept, above 0 and at most 1")
    if ratio == 1.0:
        return length
    return min(length, max(_MULTIPLE, _MULTIPLE * round(ratio * length / _MULTIPLE)))


def select_tokens(importance_BS: Tensor, kept: int, noise_BS: Tensor) -> Tensor:
    """Positions of the ``kept`` most important tokens of each block, ascending.

    Args:
        importance_BS: fp32; +inf for tokens that must stay, -inf for tokens that must go.
        kept: K, at most S.
        noise_BS: fp32 in [0, 1); orders equal tokens.

    Returns:
        int64 [B, K]. If more than K tokens must stay, the noise decides among them.
    """
    # two stable sorts: by noise, then by importance, so that noise never outweighs a difference
    by_noise_BS = noise_BS.argsort(dim=1)
    order_BS = importance_BS.gather(1, by_noise_BS).argsort(dim=1, descending=True, stable=True)
    return by_noise_BS.gather(1, order_BS)[:, :kept].sort(dim=1).values


def gather_tokens(x_BSD: Tensor, positions_BK: Tensor) -> Tensor:
    """``[B, S, D]`` at ``[B, K]`` -> ``[B, K, D]``."""
    return x_BSD.gather(1, positions_BK.unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1]))


def scatter_tokens(x_BSD: Tensor, positions_BK: Tensor, y_BKD: Tensor) -> Tensor:
    """A copy of ``[B, S, D]`` in which ``y`` stands at the positions; both get their gradients."""
    return x_BSD.scatter(1, positions_BK.unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1]), y_BKD.to(x_BSD.dtype))


def loss_sums(ids_N: Tensor, losses_N: Tensor, vocabulary: int) -> Tensor:
    """Sum of the losses and number of targets of each id.

    Args:
        ids_N: int64, the answers.
        losses_N: their losses, any float dtype.
        vocabulary: V.

    Returns:
        fp32 [2, V], which may be added up over batches and ranks.
    """
    sums = torch.zeros(2, vocabulary, device=ids_N.device)
    sums[0].index_add_(0, ids_N, losses_N.detach().float())
    sums[1].index_add_(0, ids_N, torch.ones_like(losses_N, dtype=torch.float32))
    return sums
