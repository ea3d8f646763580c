"""What every method shares: declared parameters, the optimiser, seeds per step, and small strict checkpoints.

A method names the submodules that it owns (:meth:`MethodModule.declared`). Their parameters train, everything else is
frozen; their parameters and persistent buffers (masks) are what a checkpoint holds. Loading is strict both ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from peft_lightning.errors import PeftLightningError, UsageError
from peft_lightning.files.manifest import FORMAT, MANIFEST_KEY
from peft_lightning.files.strict import check_fingerprint, check_tensors

__all__ = ["MethodModule", "OptimConfig", "as_config", "step_seed"]

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

    Raises:
        UsageError: if a value is not allowed.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = 0.1
    schedule: str = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
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

    def factor(self, step: int, total: int) -> float:
        """Factor on ``lr`` at optimizer step ``step`` (from 0) of ``total``."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        done = (step - warm) / max(1, total - warm)
        return max(0.0, 1.0 - done) if self.schedule == "linear" else 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))


def as_config(kind: type[Config], value: Config | Mapping[str, Any]) -> Config:
    """A dataclass from itself or from a mapping (the command line and checkpoints give mappings).

    Raises:
        UsageError: if a key is unknown.
    """
    if isinstance(value, kind):
        return value
    try:
        return kind(**value)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"{kind.__name__}: {error}") from None


def step_seed(*parts: int) -> int:
    """A 63-bit seed from integers, such as (seed, epoch, batch, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class MethodModule(L.LightningModule, ABC):
    """Base of all methods. Subclasses build their model in :meth:`build` and name what they own.

    Args:
        optim: the optimiser's settings.
        seed: decides initial values, dropout (with epoch, batch and rank), and ties.
    """

    def __init__(self, *, optim: OptimConfig | Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.optim = as_config(OptimConfig, optim)
        self.seed = seed
        self.strict_loading = False  # the frozen backbone is not in our files; check_tensors is strict on the rest
        self.backbone_fingerprint: dict[str, Any] = {}
        self.run_config: dict[str, Any] = {}
        self._built = False
        self._losses: list[Tensor] = []
        self.record(optim=self.optim, seed=seed)

    # -- what a method provides ------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> None:
        """Create the model. Called once, under the module's seed; sets ``backbone_fingerprint``."""

    @abstractmethod
    def declared(self) -> Iterator[nn.Module]:
        """The submodules whose parameters train and whose state is saved."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Method, trained parameters and whatever the method decided, for the report; plain values."""

    # -- hyper-parameters and construction -------------------------------------------------------------------

    def record(self, **values: Any) -> None:
        """Add hyper-parameters as plain values, so that a checkpoint loads with ``weights_only=True``."""
        self.hparams.update({key: asdict(v) if is_dataclass(v) else v for key, v in values.items()})  # type: ignore[arg-type]

    def configure_model(self) -> None:
        """Build the model once and freeze all that is not declared."""
        if self._built:
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.build()
        self.requires_grad_(False)
        for module in self.declared():
            module.requires_grad_(True)
        # Frozen backbones carry constant buffers and our masks agree by construction: DDP need not broadcast any,
        # and must not while validation shards have uneven lengths.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._built = True

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of all that trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def owned_state(self) -> dict[str, Tensor]:
        """Name -> tensor of all parameters and persistent buffers of the declared submodules."""
        names = {module: name for name, module in self.named_modules()}
        state: dict[str, Tensor] = {}
        for module in self.declared():
            prefix = f"{names[module]}." if names[module] else ""
            state |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
        return state

    # -- optimisation ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW over the declared parameters, two groups: matrices with weight decay, vectors without."""
        parameters = list(self.trainable_parameters().values())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.optim.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.optim.lr,
            betas=self.optim.betas,
            eps=self.optim.eps,
            # Lightning refuses to clip with mixed precision when the optimiser is fused.
            fused=True if self.trainer.gradient_clip_val is None else None,
        )
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UsageError(
                "trainer.max_epochs = -1: give trainer.max_steps, or the learning rate's schedule has no end"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Give the loader its position back.

        Lightning restores it while it makes the loader, but the optimiser needs to know the number of steps, so the
        loader is made before the loops are restored.
        """
        self.trainer.fit_loop._load_combined_loader_states()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch, rank), so that a resumed run repeats it."""
        torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def normalised(self, total: Tensor, weight: Tensor, batch_idx: int) -> Tensor:
        """Loss of a micro-batch from its sum and its weight, such that gradients equal those of one process.

        Args:
            total: sum of the losses of this rank's rows, a scalar.
            weight: sum of their weights, a scalar; summed over ranks here, since DDP averages gradients.
            batch_idx: number of the micro-batch in the epoch; the last group of an epoch may be shorter than
                ``accumulate_grad_batches``, by which Lightning divides, and is corrected.
        """
        weight = self.trainer.strategy.reduce(weight.detach(), reduce_op="sum") / self.trainer.world_size
        loss = total / weight.clamp_min(torch.finfo(torch.float32).tiny)
        group, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        place, size = batch_idx % group, group
        if batches != float("inf"):
            size = min(group, int(batches) - batch_idx + place)
        self._log_step(loss.detach(), last=place == size - 1)
        return loss * (group / size)

    def _log_step(self, loss: Tensor, last: bool) -> None:
        """Log the loss of an optimizer step, the mean over its micro-batches and over ranks.

        It is written here and not by ``self.log``, so that it is in the log before a checkpoint of the same step.
        """
        self._losses.append(loss)
        if not last:
            return
        losses, self._losses = self._losses, []
        step = self.trainer.global_step + 1
        every: int = getattr(self.trainer, "log_every_n_steps", 0)
        if not every or step % every:
            return
        mean = float(self.trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean"))
        if not np.isfinite(mean):
            raise PeftLightningError(
                f"the training loss is {mean} at step {step}; lower optim.lr, raise optim.warmup "
                "or clip gradients (trainer.gradient_clip_val)"
            )
        self.log("train/loss", mean, prog_bar=True, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics({"train/loss": mean, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]}, step)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """What our files say of themselves: plain values only."""
        kind = type(self)
        return {
            "format": FORMAT,
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "backbone": self.backbone_fingerprint,
            "hyper_parameters": dict(self.hparams),
            "run_config": self.run_config,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what the method owns, and add the manifest."""
        checkpoint["state_dict"] = {name: t.detach().clone() for name, t in self.owned_state().items()}
        checkpoint[MANIFEST_KEY] = self.manifest()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load all that the method owns; the frozen backbone may be among the tensors but need not.

        Raises:
            CheckpointError: lists what is missing, unexpected or of another shape, whatever ``strict`` says.
        """
        frozen = self.state_dict().keys() - self.owned_state().keys()
        check_tensors({n: t for n, t in state_dict.items() if n not in frozen}, self.owned_state(), "state_dict")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit before any tensor is touched.

        Raises:
            CheckpointError: lists the difference of backbone or tensors.
        """
        self.configure_model()
        check_fingerprint(checkpoint.get(MANIFEST_KEY, {}).get("backbone"), self.backbone_fingerprint, "checkpoint")
        check_tensors(checkpoint["state_dict"], self.owned_state(), "checkpoint")
