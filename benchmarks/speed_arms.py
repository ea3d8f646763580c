"""What the speed benchmark compares: every arm built, a batch of random tokens, and a training step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.shared import backbone
from peft_lightning import (
    AdapterConfig,
    BackboneConfig,
    FineTuneModule,
    OptimConfig,
    PruneConfig,
    SparseAdapterModule,
)
from peft_lightning.task_module import TaskModule

__all__ = ["arms", "batches", "optimizer_of", "sparse_module", "step"]

_ROWS, _TOKENS = 32, 64
_HOULSBY, _DENSE = AdapterConfig(), PruneConfig(sparsity=0.0)


def sparse_module(
    tiny: bool,
    adapter: AdapterConfig = _HOULSBY,
    prune: PruneConfig = _DENSE,
    encoder: BackboneConfig | None = None,
) -> SparseAdapterModule:
    """Return adapters on the encoder, not yet built."""
    model = encoder or backbone(tiny)
    return SparseAdapterModule(
        task="toy_pairs" if tiny else "mrpc", backbone=model, adapter=adapter, prune=prune, optim=OptimConfig(lr=1e-5)
    )


def arms(tiny: bool) -> dict[str, Callable[[], TaskModule]]:
    """Return what builds each arm; a peer is left out where its package is absent."""

    def full() -> FineTuneModule:
        module = FineTuneModule(task="toy_pairs" if tiny else "mrpc", backbone=backbone(tiny))
        module.configure_model()
        return module

    def adapters(dtype: str = "float32", **config: Any) -> Callable[[], TaskModule]:
        def build() -> TaskModule:
            module = sparse_module(tiny, AdapterConfig(**config), encoder=backbone(tiny, dtype))
            module.configure_model()
            return module

        return build

    def masked() -> SparseAdapterModule:
        # the score does not change a step's cost
        module = sparse_module(tiny, prune=PruneConfig(sparsity=0.4, score="magnitude"))
        module.configure_model()
        module.install_masks(())
        return module

    def peer() -> FineTuneModule:
        from peft import LoraConfig, get_peft_model

        module = full()
        # PEFT freezes the encoder as it wraps it; the head trains, as it does in every arm.
        module.backbone = get_peft_model(module.backbone, LoraConfig(r=8, target_modules=["query", "value"]))
        return module

    found: dict[str, Callable[[], TaskModule]] = {
        "full": full,
        "houlsby": adapters(),
        "masks": masked,
        "bf16": adapters("bfloat16"),
        "pfeiffer": adapters(kind="pfeiffer"),
        "parallel": adapters(kind="parallel"),
        "mam": adapters(kind="mam"),
        "lora": adapters(kind="lora", bottleneck=8),
    }
    return found | ({"peft_lora": peer} if importlib.util.find_spec("peft") else {})


def batches(module: TaskModule, count: int, rows: int = _ROWS) -> list[dict[str, Any]]:
    """Return batches of random tokens of full length: a step costs the same at every turn."""
    random = torch.Generator().manual_seed(0)
    config: Any = module.backbone.config
    found = []
    for _ in range(count):
        ids = torch.randint(5, config.vocab_size, (rows, _TOKENS), generator=random)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        found.append({"inputs": inputs, "labels": torch.randint(0, 2, (rows,), generator=random)})
    return found


def optimizer_of(module: TaskModule) -> torch.optim.Optimizer:
    """Return the optimiser that every arm is stepped with."""
    return torch.optim.AdamW(module.trainable_parameters().values(), lr=1e-5, fused=True)


def step(module: TaskModule, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> None:
    """Forward, loss, backward, update."""
    loss, weight = module.batch_loss(batch)
    (loss / weight).backward()
    optimizer.step()
    optimizer.zero_grad()
