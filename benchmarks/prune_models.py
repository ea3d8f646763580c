"""The models that the Prune-LoRA benchmark times: random encoders in two sizes, pruned by a drawn importance.

A step costs the same whichever heads go, so the importance is drawn.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_lightning import BackboneConfig, FineTuneModule, PruneLoRAModule, StructureConfig
from peft_lightning.layers.importance import Importance
from peft_lightning.layers.planning import decide_plan
from peft_lightning.layers.pruned_heads import attention_sites, feed_forward_sites
from peft_lightning.task_module import TaskModule

__all__ = ["SHAPES", "TIMED", "encoder", "timed_module"]

SHAPES = {"minilm": (384, 12, 1536), "bert-base": (768, 12, 3072)}
"""Width, heads and neurons; 12 layers each."""

_TINY = (32, 4, 64)
TIMED = {
    "full": None,
    "lora": StructureConfig(heads_to_prune=0),
    "prune": StructureConfig(),
    "ffn": StructureConfig(ffn_to_prune=0.3),
}
"""Full fine-tuning, and Prune-LoRA that removes nothing, 44 of 144 heads, and 30 % of the neurons too."""


def encoder(shape: str, tiny: bool) -> BackboneConfig:
    """Return a random BERT of one of the sizes, or a tiny one."""
    width, heads, inner = _TINY if tiny else SHAPES[shape]
    config: dict[str, Any] = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": 2 if tiny else 12,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": 40 if tiny else 30522,
    }
    return BackboneConfig(config=config, tokenizer="toy")


def timed_module(shape: str, name: str, tiny: bool) -> TaskModule:
    """Return an arm, built; its ranks are those of the default, also where nothing is pruned."""
    model, prune = encoder(shape, tiny), TIMED[name]
    if prune is None:
        full = FineTuneModule(task="toy_pairs", backbone=model)
        full.configure_model()
        return full
    module = PruneLoRAModule(task="toy_pairs", backbone=model, prune=prune)
    module.configure_model()
    choices: dict[str, Any] = {"settings": module.importance, "prune": prune, "lora": module.lora}
    module.install(decide_plan(module.backbone, _drawn(module), **choices, seed=0))
    return module


def _drawn(module: PruneLoRAModule) -> Importance:
    generator = torch.Generator().manual_seed(0)
    sites, blocks = attention_sites(module.backbone), feed_forward_sites(module.backbone)
    heads = {path: torch.rand(site.units, generator=generator) for path, site in sites.items()}
    neurons = {path: torch.rand(site.units, generator=generator) for path, site in blocks.items()}
    return Importance(heads=heads, neurons=neurons, examples=1, tokens=1)
