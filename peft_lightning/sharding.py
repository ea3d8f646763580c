"""Sharded training of large models: ``trainer.strategy fsdp2``, FSDP2 (torch's ``fully_shard``) driven by Lightning.

Every rank holds one of N parts of each trained tensor, of its gradient and of the optimiser's moments. Before a block
computes, its weights are gathered from all ranks; after it they are let go, and its gradients are summed over the ranks
and cut up again. It pays where most of the model trains. Weights are gathered and gradients summed in float32, so that
the numbers are those of ``ddp``, with bf16-mixed as well.

A checkpoint holds whole tensors, as any other strategy's does: a run may go on under ``ddp``, or on another number of
ranks. The model is built on every rank, on the CPU, before it is cut up.

A module takes part by a method ``sharded_blocks()`` -> pairs of a submodule and the name of what computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_lightning.errors import UsageError

__all__ = ["ShardedStrategy", "check_machine", "shard", "through", "whole"]


def whole(tensor: Tensor, *, keep: bool = True) -> Tensor:
    """A tensor as it is; one that is sharded, gathered from all ranks, on the CPU. All ranks must call this.

    Args:
        tensor: any.
        keep: whether this rank wants what is gathered; if not, it gets an empty tensor.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = cast(DTensor, tensor.detach()).full_tensor()
    return gathered.cpu() if keep else gathered.new_empty(0, device="cpu")


def check_machine(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Refuse a strategy that would not train right, and a precision that would convert what is trained and saved.

    Raises:
        UsageError: names the option, the reason and what is allowed.
    """
    if str(trainer.precision) not in ("32-true", "bf16-mixed", "16-mixed"):
        raise UsageError(
            f"trainer.precision = {trainer.precision}: must be 32-true, bf16-mixed or 16-mixed; "
            "backbone.dtype holds a frozen backbone in bfloat16"
        )
    strategy = trainer.strategy
    if not isinstance(strategy, ShardedStrategy):
        by = getattr(strategy, "_start_method", "popen")
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or by not in (None, "popen"):
            name = type(strategy).__name__ if by in (None, "popen") else f"ddp_{by}"
            raise UsageError(f"trainer.strategy = {name}: must be auto, ddp or fsdp2")
        return
    backbone, kind = getattr(module, "backbone_config", None), getattr(module, "kind", None)
    reasons = {
        f"{type(module).__name__} trains a small part of its model, of which nothing is gained by cutting it up": (
            not hasattr(module, "sharded_blocks")
        ),
        "tasks whose answers are written word by word would make the ranks wait for each other for ever": (
            getattr(kind, "generates", False)
        ),
        "backbone.compile true is not tried with it": getattr(backbone, "compile", False),
        f"trainer.precision {trainer.precision} is not among 32-true and bf16-mixed": trainer.precision == "16-mixed",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"trainer.strategy = fsdp2: {reason}; use ddp")


def through(strategy: Any, step: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Carry a step of the strategy's module out, with the weights that it needs at hand: under any strategy."""
    if isinstance(strategy, ShardedStrategy):
        module: Any = strategy.lightning_module
        return module._sharded[0](step, *args, **options)
    return step(*args, **options)


class _Whole(nn.Module):
    """Owns all that is cut up; a step of the module is its forward pass, so that everything is gathered in time."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Carry ``step`` out."""
        return step(*args, **options)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, with this package's checkpoints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    # -- setting up ----------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded into the whole model, by the same strict code as everywhere, and cut up afterwards."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimiser's state comes back through :meth:`load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Make all ranks one group: Lightning's own choice would cut nothing up within a node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Cut the module up, unless a trainer has done so before."""
        module: Any = self.lightning_module
        if "_sharded" not in vars(module):
            module._sharded = (shard(module, self.device_mesh["data_parallel"]),)  # in a tuple: no submodule
        super().setup(trainer)
        # Gathered weights may not be inference tensors, which nothing could train on afterwards.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False

    # -- steps ---------------------------------------------------------------------------------------------------

    def _through(self, name: str, *args: Any, **options: Any) -> Any:
        return through(self, getattr(self.lightning_module, name), *args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        """A step of the module, with the weights that it needs at hand."""
        with self.precision_plugin.train_step_context():
            return self._through("training_step", *args, **options)

    def validation_step(self, *args: Any, **options: Any) -> Any:
        """The same for validation."""
        with self.precision_plugin.val_step_context():
            return self._through("validation_step", *args, **options)

    def test_step(self, *args: Any, **options: Any) -> Any:
        """The same for a test."""
        with self.precision_plugin.test_step_context():
            return self._through("test_step", *args, **options)

    def predict_step(self, *args: Any, **options: Any) -> Any:
        """The same for answers."""
        with self.precision_plugin.predict_step_context():
            return self._through("predict_step", *args, **options)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the module says itself what a checkpoint holds."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimiser's state with whole tensors, on rank 0; all ranks must call this."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        moments = {
            number: {name: _whole_or(value, self.is_global_zero) for name, value in entries.items()}
            for number, entries in state["state"].items()
        }
        return {**state, "state": moments} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint as every strategy does."""
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the module its tensors, cut up if the module is."""
        module = cast(L.LightningModule, self.lightning_module)
        own = module.state_dict(keep_vars=True)
        state = {name: _like(tensor, own.get(name)) for name, tensor in checkpoint["state_dict"].items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimisers their states, each rank its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {name: _like(value, parameters[number]) for name, value in entries.items()}
                for number, entries in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})


def shard(module: Any, mesh: DeviceMesh) -> nn.Module:
    """Cut a module up: each block, then all the rest together, so that embeddings and head are at hand during a step.

    Args:
        module: built, with ``sharded_blocks``.
        mesh: of one dimension: the ranks.

    Returns:
        What gathers: call it with a step and the step's arguments.
    """
    for block, method in module.sharded_blocks():
        fully_shard(block, mesh=mesh)
        if method != "forward":  # which is known to be one
            register_fsdp_forward_method(block, method)
    # always cut up between steps, so that saving and the optimiser see the same tensors after a validation too
    return cast(nn.Module, fully_shard(_Whole(module.declared()), mesh=mesh, reshard_after_forward=True))


def _whole_or(value: Any, keep: bool) -> Any:
    return whole(value, keep=keep) if isinstance(value, Tensor) else value


def _like(value: Any, own: Tensor | None) -> Any:
    """``value``, cut up as ``own`` is; as it is where the two differ in shape, which strict loading then names."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    # every rank has read the same file: no rank needs to send
    local = value.to(device=own.to_local().device)
    return distribute_tensor(local, own.device_mesh, own.placements, src_data_rank=None)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="weights, gradients and moments cut up over all ranks")
