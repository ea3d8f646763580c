"""Modules of Prune-LoRA that lost heads and neurons, another choice in every layer, and were trained (at random)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_lightning import PruneLoRAModule
from peft_lightning.layers.plan import PrunePlan
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites
from tests.families import backbone_setting
from tests.toy import build

# Enough heads that some can go, and groups of two query heads where keys are shared.
_GROUPED: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
HEADS: dict[str, dict[str, Any]] = {
    **{family: {"num_attention_heads": 4} for family in ("bert", "roberta", "electra", "deberta-v2")},
    "bart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{family: _GROUPED for family in ("llama", "qwen2", "qwen3")},
}


def four_heads(family: str, **changes: Any) -> dict[str, Any]:
    """The setting of a tiny random backbone with four heads, or groups of heads, in every attention."""
    setting = backbone_setting(family)
    return {**setting, "config": {**setting["config"], **HEADS[family], "vocab_size": 48, **changes}}


def pruned(backbone: Any, heads: Mapping[int, tuple[int, ...]] | None = None, **options: Any) -> PruneLoRAModule:
    """A module on a backbone of :func:`four_heads`, or on a folder of one, in evaluation mode.

    ``heads``: number of an attention -> what it keeps, if not the usual two.
    """
    if isinstance(backbone, str):
        backbone = {"name": backbone, "tokenizer": "toy"}
    module: PruneLoRAModule = build(PruneLoRAModule, backbone=backbone, dropout=0.0, **options)
    module.configure_model()
    if module.plan is None:
        sites, blocks = attention_sites(module.backbone), feed_forward_sites(module.backbone)
        kept: dict[str, tuple[int, ...]] = {path: (number % 2, 3) for number, path in enumerate(sites)}
        kept |= {list(sites)[number]: units for number, units in (heads or {}).items()}
        plan = PrunePlan(
            heads=kept,
            neurons={path: tuple(range(n % 3, site.units, 3)) for n, (path, site) in enumerate(blocks.items())},
            ranks={path: 1 + number % 3 for number, path in enumerate(blocks)},
            units={path: site.units for path, site in sites.items()},
            inner={path: site.units for path, site in blocks.items()},
        )
        module.install(plan)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.trainable_parameters().values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return module.eval()
