"""What the pretraining benchmark compares: models, arms that share one batch, and a training step of each.

``mlm`` has both savings that every arm of ours can have: the last layer and the head see the targets only. ``dense``
lacks the first, and ``transformers`` is the library's own model with labels, whose head sees every position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning import BackboneConfig, DropConfig, SCTDPretrainModule

__all__ = ["ARMS", "Setting", "build_arm", "settings", "token_batch"]

_CONFIG = {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_RATE = 0.15


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, a batch and a device.

    Attributes:
        config: options of the model.
        blocks: of a batch.
        length: tokens of a block.
        device: cpu or cuda.
        compiled: whether our arms are compiled, and the library's model too.
    """

    config: dict[str, Any]
    blocks: int
    length: int
    device: str = "cpu"
    compiled: bool = False

    @property
    def targets(self) -> int:
        """Tokens of a block that are predicted."""
        return round(_RATE * self.length)

    def precision(self) -> AbstractContextManager[Any]:
        """Float32 on a CPU, bfloat16 elsewhere."""
        return nullcontext() if self.device == "cpu" else torch.autocast(self.device, torch.bfloat16)


def settings(tiny: bool, device: str) -> dict[str, Setting]:
    """Name -> setting: one for a CPU, BERT-base and -large with short and long blocks for a GPU."""
    if tiny:
        small = {**_CONFIG, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        return {"tiny": Setting(config={**small, "intermediate_size": 64, "vocab_size": 256}, blocks=4, length=32)}
    if device == "cpu":
        narrow = {**_CONFIG, "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4}
        return {"cpu": Setting(config={**narrow, "intermediate_size": 1024, "vocab_size": 8192}, blocks=16, length=128)}
    base = {**_CONFIG, "vocab_size": 30528}  # 30,522 words, rounded up
    large = {**base, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    sizes = {"base-128": (base, 256, 128), "base-512": (base, 64, 512)}
    sizes |= {"large-128": (large, 128, 128), "large-512": (large, 32, 512)}
    return {
        name: Setting(config=config, blocks=blocks, length=length, device=device, compiled=True)
        for name, (config, blocks, length) in sizes.items()
    }


def token_batch(setting: Setting) -> dict[str, Tensor]:
    """Random tokens, targets and noise: a step costs the same whatever they are."""
    random = torch.Generator().manual_seed(0)
    shape = (setting.blocks, setting.length)
    ids_BS = torch.randint(5, setting.config["vocab_size"], shape, generator=random)
    order_BS = torch.rand(shape, generator=random).argsort(1)
    targets_BP = order_BS[:, : setting.targets].sort(1).values
    batch = {
        "input_ids": ids_BS.scatter(1, targets_BP, 4),
        "targets": targets_BP,
        "labels": ids_BS.gather(1, targets_BP),
        "noise": torch.rand(shape, generator=random),
    }
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


# arm -> settings of dropping, and the passes of its step; the library's own model has none
ARMS: dict[str, tuple[dict[str, Any], str] | None] = {
    "transformers": None,
    "dense": ({"preset": "mlm", "sparse_last": False}, "full"),
    "mlm": ({"preset": "mlm"}, "full"),
    "dropping": ({"preset": "sctd"}, "dropping"),
    "semantic": ({"preset": "sctd"}, "both"),
    "semantic_unshared": ({"preset": "sctd", "share_prefix": False}, "both"),
}


def build_arm(name: str, setting: Setting, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return what takes one training step of an arm: forward, backward, importance, update."""
    arm = ARMS[name]
    if arm is None:
        return _library(setting, batch)
    drop, passes = arm
    module = SCTDPretrainModule(
        backbone=BackboneConfig(config=setting.config, compile=setting.compiled), drop=DropConfig(**drop), seed=42
    )
    module.configure_model()
    module.to(setting.device).train()
    optimizer = _optimizer(module)

    def step() -> None:
        with setting.precision():
            loss, found, _ = module.losses(batch, passes)
        loss.backward()
        if module.drops:
            module.importance.collect(batch["labels"].flatten(), found.token_losses)
            module.importance.update(module.drop.of("beta"), lambda sums: sums)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _library(setting: Setting, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    import transformers

    config = transformers.AutoConfig.for_model(**setting.config)
    torch.manual_seed(42)  # the weights that the other arms begin with
    model: Any = transformers.AutoModelForMaskedLM.from_config(config).to(setting.device).train()
    if setting.compiled:
        model.compile(dynamic=False)
    labels_BS = torch.full_like(batch["input_ids"], -100).scatter(1, batch["targets"], batch["labels"])
    optimizer = _optimizer(model)

    def step() -> None:
        with setting.precision():
            loss = model(input_ids=batch["input_ids"], labels=labels_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5, fused=True)
