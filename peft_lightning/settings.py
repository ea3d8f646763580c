"""Settings that all methods share, as frozen dataclasses that check themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from peft_lightning.checks import check_types, nearest
from peft_lightning.errors import UsageError

__all__ = ["OptimConfig", "as_config"]

Config = TypeVar("Config")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled; biases and LayerNorms are never decayed.
        betas: Adam's two averages.
        eps: Adam's epsilon.
        warmup: share of all optimizer steps over which the rate rises from 0.
        schedule: what follows the warm-up: linear or cosine to 0, or constant.
        non_finite: what happens when a step's loss or gradient is not finite: stop (on a GPU when the loss is looked at
            next, every trainer.log_every_n_steps), or skip (the step changes nothing and is counted; on a GPU every
            step then waits for its loss; ten in a row stop).
        keep_bad_batches: whether the batches of such a step are written into the run's folder, as safetensors, the
            first ten.

    Raises:
        UsageError: if a value is not allowed.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.1
    schedule: str = "linear"
    non_finite: str = "stop"
    keep_bad_batches: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_types(self, "optim")
        if not self.lr > 0:
            raise UsageError(f"optim.lr = {self.lr}: must be above 0")
        if self.weight_decay < 0:
            raise UsageError(f"optim.weight_decay = {self.weight_decay}: must be at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optim.betas = {self.betas}: both must lie in [0, 1)")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"optim.warmup = {self.warmup}: must be a share of the steps in [0, 1]")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"optim.schedule = {self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if self.non_finite not in ("stop", "skip"):
            raise UsageError(f"optim.non_finite = {self.non_finite!r}: must be stop or skip")

    def factor(self, step: int, total: int) -> float:
        """Factor on ``lr`` at optimizer step ``step`` (from 0) of ``total``."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        done = (step - warm) / max(1, total - warm)
        return max(0.0, 1.0 - done) if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def as_config(kind: type[Config], value: Config | Mapping[str, Any]) -> Config:
    """A dataclass from itself or from a mapping (the command line and checkpoints give mappings).

    Raises:
        UsageError: if a key is unknown, or it is something else.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise UsageError(f"{kind.__name__}: must be one or a mapping, not {value!r:.200}")
    allowed = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    if odd := [name for name in value if name not in allowed]:
        meant = nearest(odd[0], allowed)
        raise UsageError(f"{kind.__name__} has no option {odd[0]!r}{meant}; allowed: {', '.join(allowed)}")
    try:
        return kind(**value)
    except TypeError as error:
        raise UsageError(f"{kind.__name__}: {error}") from None
