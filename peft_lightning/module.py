"""What every method shares: declared parameters, the optimiser, seeds per step, and small strict checkpoints.

A method names the submodules that it owns (:meth:`MethodModule.declared`). Their parameters train, everything else is
frozen; their parameters and persistent buffers (masks) are what a checkpoint holds. Loading is strict both ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from peft_lightning.errors import PeftLightningError, UsageError
from peft_lightning.files.manifest import FORMAT, MANIFEST_KEY
from peft_lightning.files.strict import check_fingerprint, check_settings, check_tensors
from peft_lightning.non_finite import REMEDY, FiniteGuard
from peft_lightning.optimizer import adamw
from peft_lightning.seeding import seeded_on_cpu, step_seed
from peft_lightning.settings import OptimConfig, as_config
from peft_lightning.sharding import check_machine, whole

__all__ = ["MethodModule"]


class MethodModule(L.LightningModule, ABC):
    """Base of all methods. Subclasses build their model in :meth:`build` and name what they own.

    Args:
        optim: the optimiser's settings.
        seed: decides initial values, dropout (with epoch, batch and rank), and ties.
    """

    def __init__(self, *, optim: OptimConfig | Mapping[str, Any], seed: int) -> None:
        super().__init__()
        self.optim = as_config(OptimConfig, optim)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise UsageError(f"seed = {seed!r}: must be a whole number, at least 0 and below 2**63")
        self.seed = seed
        self.strict_loading = False  # the frozen backbone is not in our files; check_tensors is strict on the rest
        self.backbone_fingerprint: dict[str, Any] = {}
        self._recorded_fingerprint: Mapping[str, Any] | None = None
        self.run_config: dict[str, Any] = {}
        self._built = False
        self.guard = FiniteGuard(self)
        self._totals: list[Tensor] = []
        self._weights: list[Tensor] = []
        self.record(optim=self.optim, seed=seed)

    # Settings that a checkpoint decides: other values beside it cannot be honoured, so they are refused.
    fixed_by_file: tuple[str, ...] = tuple(
        f"optim.{f.name}" for f in fields(OptimConfig) if f.name not in ("non_finite", "keep_bad_batches")
    )

    # -- what a method provides ------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> None:
        """Create the model. Called once, under the module's seed; calls :meth:`identify` on the bare backbone."""

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

    def setup(self, stage: str) -> None:
        """Refuse a strategy that would not train right, or a precision that converts what is saved (UsageError)."""
        check_machine(self, self.trainer)

    def configure_model(self) -> None:
        """Build the model once and freeze all that is not declared."""
        if self._built:
            return
        with seeded_on_cpu(self.seed):
            self.build()
        self.train_declared()
        self._built = True

    def train_declared(self) -> None:
        """Let what is declared train, and nothing else."""
        self.requires_grad_(False)
        for module in self.declared():
            module.requires_grad_(True)
        # Frozen backbones carry constant buffers and our masks agree by construction: DDP need not broadcast any,
        # and must not while validation shards have uneven lengths.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def identify(self, fingerprint: dict[str, Any]) -> None:
        """Say what the backbone is, before anything is attached to it.

        Raises:
            CheckpointError: if a checkpoint is being loaded that was made on another one; lists the difference.
        """
        self.backbone_fingerprint = fingerprint
        if self._recorded_fingerprint is not None:
            check_fingerprint(self._recorded_fingerprint, fingerprint, "checkpoint")

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of all that trains."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def owned_state(self) -> dict[str, Tensor]:
        """Name -> tensor of all parameters and persistent buffers of the declared submodules.

        Of one tensor with several names, as BART's embeddings, the first name. If it is sharded, all ranks must ask.
        """
        names = {module: name for name, module in self.named_modules()}
        found: dict[int, tuple[str, Tensor]] = {}
        for module in self.declared():
            prefix = f"{names[module]}." if names[module] else ""
            for name, tensor in module.state_dict(keep_vars=True).items():
                found.setdefault(id(tensor), (prefix + name, tensor.detach()))
        return {name: whole(tensor) for name, tensor in found.values()}

    # -- optimisation ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW over the declared parameters, and its schedule."""
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UsageError("trainer.max_epochs = -1: give trainer.max_steps, or the schedule of the rate has no end")
        # Lightning refuses to clip with mixed precision when the optimiser is fused.
        fused = True if self.trainer.gradient_clip_val is None else None
        optimizer = adamw(self.trainable_parameters().values(), self.optim, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optim.factor(step, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Train in training mode, also what ``load`` gave in evaluation mode, and give the loader its position back.

        Lightning restores it while it makes the loader, but the optimiser needs to know the number of steps, so the
        loader is made before the loops are restored. And not between two epochs, where the loader must see that the
        data are the same all the same.
        """
        if not self.training:  # Lightning keeps the mode that it finds
            self.train()
        self._totals, self._weights = [], []  # a fit that was interrupted may have left some
        self.guard.begin()
        loop = self.trainer.fit_loop
        if loop._combined_loader is not None and (states := loop._combined_loader_states_to_load):
            loop._combined_loader._load_state_dicts(states)
            loop._combined_loader_states_to_load = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch, rank), so that a resumed run repeats it."""
        torch.manual_seed(step_seed(self.seed, self.current_epoch, batch_idx, self.global_rank))
        self.guard.remember(batch, batch_idx)

    def normalised(self, total: Tensor, weight: Tensor, *, alike: bool = False) -> Tensor:
        """Loss of a micro-batch from its sum and its weight, such that gradients equal those of one large batch.

        The weight of an optimizer step is known at its end only. Until then its first micro-batch's stands in for
        all, or 1 where it is 0; :meth:`on_before_optimizer_step` corrects the gradients. The loss of no weight is 0.

        Args:
            total: sum of the losses of this rank's rows, a scalar.
            weight: sum of their weights, a scalar; summed over ranks here, since DDP averages gradients.
            alike: whether the weight is the same on all ranks, which then need not speak to each other.
        """
        world = self.trainer.world_size
        weight = weight.detach() * world if alike else self.summed(weight.detach().clone())
        self._totals.append(total.detach() * world)
        self._weights.append(weight)
        return total * world / _or_one(self._weights[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide by the weight of the whole step (before gradients are clipped), and log its loss.

        The loss is written here and not by ``self.log``, so that it is in the log before a checkpoint of the same
        step.
        """
        if not self._weights:
            return
        totals, weights = torch.stack(self._totals), torch.stack(self._weights)
        self._totals, self._weights = [], []
        group = self.trainer.accumulate_grad_batches
        if group > 1:  # Lightning has divided by it
            factor = _or_one(weights[0]) * group / _or_one(weights.sum())
            for parameter in self.trainable_parameters().values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.dtype))
        step = self.trainer.global_step + 1
        every: int = getattr(self.trainer, "log_every_n_steps", 0)
        due, skips = bool(every) and step % every == 0, self.optim.non_finite == "skip"
        if due or skips or self.device.type == "cpu":  # elsewhere looking at a number makes the device wait
            loss, finite = self.guard.looked(totals.sum() / _or_one(weights.sum()))
            if not finite:
                self.guard.refuse(loss, step, optimizer)
                self._totals, self._weights = [], []  # of the look for the cause
                self.write_log({"train/skipped_steps": float(self.skipped_steps)}, step)
            elif due:
                self.log("train/loss", loss, prog_bar=True, logger=False)
                self.write_log({"train/loss": loss, "lr": optimizer.param_groups[0]["lr"]}, step)
        self.guard.begin()

    def summed(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, for their loss or gradient was not finite."""
        return self.guard.skipped

    def write_log(self, values: dict[str, float], step: int) -> None:
        """Write numbers to all loggers at once, before a checkpoint of the same step."""
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """What our files say of themselves: plain values only."""
        return {
            "format": FORMAT,
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": self.backbone_fingerprint,
            "hyper_parameters": dict(self.hparams),
            "run_config": self.run_config,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what the method owns, and add the manifest.

        Raises:
            PeftLightningError: if a tensor is not finite: the last good file stays.
        """
        copies: dict[tuple[Any, ...], Tensor] = {}  # tied weights stay one tensor
        state = {
            name: copies.setdefault((t.data_ptr(), t.shape) if t.numel() else (name,), t.detach().clone())
            for name, t in self.owned_state().items()
        }
        bad = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if bad:
            raise PeftLightningError(
                f"training has diverged: {bad[0]} and {len(bad) - 1} other tensors are not finite at step "
                f"{self.trainer.global_step}, nothing is saved; {REMEDY}"
            )
        checkpoint["state_dict"] = state
        checkpoint[MANIFEST_KEY] = self.manifest()
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["skipped_in_a_row"] = self.guard.in_a_row

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load all that the method owns; the frozen backbone may be among the tensors but need not.

        Raises:
            CheckpointError: lists what is missing, unexpected or of another shape, whatever ``strict`` says.
        """
        frozen = self.state_dict().keys() - self.owned_state().keys()
        check_tensors({n: t for n, t in state_dict.items() if n not in frozen}, self.owned_state(), "checkpoint")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def before_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Take from a checkpoint what the data needs to know, before it is read; nothing by default."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit before any tensor is touched; :meth:`load_state_dict` compares the tensors.

        Raises:
            CheckpointError: lists the difference of the backbone.
            UsageError: names a setting that the file decides and that differs here.
        """
        self._recorded_fingerprint = checkpoint.get(MANIFEST_KEY, {}).get("backbone") or {}
        self.guard.skipped = int(checkpoint.get("skipped_steps", 0))
        self.guard.in_a_row = int(checkpoint.get("skipped_in_a_row", 0))
        self.before_data(checkpoint)
        self.configure_model()
        self.identify(self.backbone_fingerprint)
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        recorded = checkpoint.get(MANIFEST_KEY, {}).get("hyper_parameters", {})
        check_settings(recorded, self.hparams, [k for k in self.fixed_by_file if fitting or not k.startswith("optim")])


def _or_one(weight: Tensor) -> Tensor:
    """``weight``, or 1 where it is 0."""
    return torch.where(weight == 0, torch.ones_like(weight), weight)
