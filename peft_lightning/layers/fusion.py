"""AdapterFusion: several frozen adapters at each site, and attention over their outputs (Pfeiffer et al., 2021).

    p = softmax_i(q(x)' k(u_i))          u_i = c_i f_i(x), the update of the adapter i
    h <- h + sum_i p_i V u_i             V starts as the identity

Paper: https://arxiv.org/abs/2005.00247, section 3.2. Symbols: ``x`` = what the adapters read, ``q`` and ``k`` = linear
maps with bias, ``V`` = a linear map without. As in AdapterHub's library (1.3.0) scores are not divided by sqrt(D),
dropout falls on scores, and off its diagonal V starts from 1e-6. Its regulariser ``0.01 |I - V|^2`` is added to
gradients there, one step late and outside of what is logged; here it is a term of the loss (:func:`identity_penalty`).

Computed with two maps less per adapter, which changes nothing: ``q' (K u + b) = (K' q)' u + q' b``, and V of the sum
is the sum of V.

Shapes: B batch, L tokens, D model width, A adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lightning.errors import UsageError
from peft_lightning.layers.adapters import AdapterConfig, attach_adapters
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.hooks import SiteLayer
from peft_lightning.layers.inject import add_child
from peft_lightning.layers.sites import find_sites, hook

__all__ = ["AdapterFusion", "attach_fusion", "identity_penalty"]

_KINDS = ("houlsby", "pfeiffer")
_GROUP = "adapter_fusion_layer"
_OFF_DIAGONAL = 1e-6


class AdapterFusion(SiteLayer):
    """Attention over the updates of the adapters at one site.

    Args:
        width: D.
        adapters: at least one; they stay submodules of the backbone only, and are frozen.
        dropout: of the scores.
    """

    def __init__(self, width: int, adapters: Sequence[Bottleneck], dropout: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.value.weight.fill_(_OFF_DIAGONAL).fill_diagonal_(1.0)
        self._unregistered = tuple(adapters)
        for adapter in adapters:
            adapter.requires_grad_(False)

    def forward(self, input_BLD: Tensor) -> Tensor:
        """``[B, L, D] -> [B, L, D]``: the weighted sum of the adapters' updates, in the input's dtype."""
        updates_BLAD = torch.stack(
            [adapter.scaling * adapter.adapter_up(adapter.adapter_down(input_BLD)) for adapter in self._unregistered],
            -2,
        )
        shares_BLA = self.shares(input_BLD, updates_BLAD).to(updates_BLAD.dtype)
        sum_BLD = (shares_BLA.unsqueeze(-2) @ updates_BLAD).squeeze(-2)
        return F.linear(sum_BLD, self.value.weight.to(sum_BLD.dtype)).to(input_BLD.dtype)

    def shares(self, input_BLD: Tensor, updates_BLAD: Tensor) -> Tensor:
        """How much of each adapter's update is taken, in float32 at least: ``[B, L, A]``, which sums to 1."""
        dtype = input_BLD.dtype
        query_BLD = F.linear(input_BLD, self.query.weight.to(dtype), self.query.bias.to(dtype))
        back_BLD = query_BLD @ self.key.weight.to(query_BLD.dtype)
        scores_BLA = (updates_BLAD @ back_BLD.unsqueeze(-1).to(updates_BLAD.dtype)).squeeze(-1)
        scores_BLA = scores_BLA + (query_BLD @ self.key.bias.to(query_BLD.dtype)).unsqueeze(-1)  # for dropout only
        wide = torch.promote_types(scores_BLA.dtype, torch.float32)
        return cast(Tensor, self.dropout(scores_BLA.to(wide))).softmax(-1)

    def plus(self, base_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        """``[B, L, D]``: the base plus the fused update for the input."""
        return base_BLD + self(input_BLD)


def attach_fusion(
    backbone: nn.Module, configs: Sequence[AdapterConfig], *, dropout: float | None = None, masked: bool = False
) -> dict[str, AdapterFusion]:
    """Put several adapters side by side on a backbone, frozen, and a fusion over them at each site.

    Args:
        backbone: a bare model of transformers, changed in place.
        configs: of the adapters, each with a name of its own; bottlenecks, nonlinearities and scalings may differ.
        dropout: of the scores; None: the backbone's in attention.
        masked: whether the adapters' matrices carry masks (S-AF of SparseAdapter's table 4).

    Returns:
        The fusions by their path inside the backbone, which is AdapterHub's.

    Raises:
        UsageError: if there are fewer than two adapters, their kinds or places differ, or the kind cannot be fused.
    """
    kinds = sorted({config.kind for config in configs})
    if len(configs) < 2 or len(kinds) > 1 or kinds[0] not in _KINDS:
        given = ", ".join(config.kind for config in configs) or "none"
        raise UsageError(f"fusion of {given}: must be two adapters or more of one kind, {' or '.join(_KINDS)}")
    hf_config: Any = backbone.config
    by_site: dict[str, list[Bottleneck]] = {}
    for config in configs:
        for path, adapter in attach_adapters(backbone, config, masked=masked, hooked=False).items():
            by_site.setdefault(path.partition(".adapters.")[0], []).append(cast(Bottleneck, adapter))
    if uneven := [site for site, adapters in by_site.items() if len(adapters) < len(configs)]:
        raise UsageError(f"fusion of {len(configs)} adapters: {uneven[0]} has {len(by_site[uneven[0]])} of them only")
    rate = getattr(hf_config, "attention_probs_dropout_prob", 0.0) if dropout is None else dropout
    name = ",".join(config.name for config in configs)
    fusions = {}
    for site in find_sites(backbone, kinds[0], cross=any(config.cross for config in configs)):
        if site.path in by_site:
            fusion = AdapterFusion(hf_config.hidden_size, by_site[site.path], rate)
            fusions[add_child(backbone, site.path, _GROUP, name, fusion)] = fusion
            hook(backbone, site, fusion)
    return fusions


def identity_penalty(fusions: Iterable[AdapterFusion] | Mapping[str, AdapterFusion], weight: float = 0.01) -> Tensor:
    """Return ``weight * sum |I - V|^2`` over all fusions, a scalar to add to the loss."""
    parts = []
    for fusion in fusions.values() if isinstance(fusions, Mapping) else fusions:
        matrix_DD = fusion.value.weight
        parts.append((torch.eye(len(matrix_DD), device=matrix_DD.device) - matrix_DD).square().sum())
    return weight * torch.stack(parts).sum()
