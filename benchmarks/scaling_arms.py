"""What the scaling benchmark counts and times: every method built, its batch, and the loss of a step.

Operations are those of all products of a step, forward and backward, as torch counts them while it computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pretrain_arms import Setting, token_batch
from benchmarks.prune_models import encoder, timed_module
from benchmarks.scaling_model import Load
from benchmarks.speed_arms import batches
from peft_lightning import (
    AdapterConfig,
    BackboneConfig,
    DropConfig,
    FineTuneModule,
    FusionModule,
    MerAModule,
    MergeConfig,
    PruneConfig,
    SCTDPretrainModule,
    SparseAdapterModule,
)
from peft_lightning.files.manifest import write_adapter
from peft_lightning.module import MethodModule
from peft_lightning.task_module import TaskModule

__all__ = ["ARMS", "Arm", "build_arm", "load_of"]

ARMS = (
    *("FineTune", "FineTune-fsdp2", "SparseAdapter", "PruneLoRA", "MerA", "Fusion"),
    *("SCTDPretrain", "SCTDPretrain-fsdp2"),
)
_TASK = "toy_pairs"
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20  # bytes that DDP sums at a time


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method built, and the loss of its step."""

    module: MethodModule
    loss: Callable[[], Tensor]
    rows: int
    tokens: int
    sharded: bool = False


def build_arm(name: str, shape: str, tiny: bool, rows: int) -> Arm:
    """Return an arm of a size of the models (``minilm`` or ``bert-base``), ``rows`` texts or blocks a step."""
    method, _, sharded = name.partition("-")
    if method == "SCTDPretrain":
        config = {**(encoder(shape, tiny).config or {}), "num_hidden_layers": 4 if tiny else 12}
        setting = Setting(config=config, blocks=rows, length=32 if tiny else 128)
        pretrain = SCTDPretrainModule(backbone=BackboneConfig(config=config), drop=DropConfig(preset="sctd"))
        pretrain.configure_model()
        blocks = token_batch(setting)
        return Arm(
            module=pretrain,
            loss=lambda: pretrain.losses(blocks, "dropping")[0],
            rows=rows,
            tokens=setting.length,
            sharded=bool(sharded),
        )
    module = _task_module(method, shape, tiny)
    (batch,) = batches(module, 1, rows)

    def loss() -> Tensor:
        total, weight = module.batch_loss(batch)
        return total / weight

    return Arm(module=module, loss=loss, rows=rows, tokens=batch["inputs"]["input_ids"].shape[1], sharded=bool(sharded))


def _task_module(method: str, shape: str, tiny: bool) -> TaskModule:
    model = encoder(shape, tiny)
    if method == "PruneLoRA":
        return timed_module(shape, "prune", tiny)
    module: Any
    if method == "FineTune":
        module = FineTuneModule(task=_TASK, backbone=model)
    elif method == "SparseAdapter":
        module = SparseAdapterModule(task=_TASK, backbone=model, prune=PruneConfig(sparsity=0.4, score="magnitude"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            sources = list(_sources(Path(folder), model))
            if method == "Fusion":
                module = FusionModule(task=_TASK, backbone=model, sources=sources)
                module.configure_model()
            else:
                module = MerAModule(task=_TASK, backbone=model, sources=sources, merge=MergeConfig(preset="avg"))
                module.merge_sources()
        return module
    module.configure_model()
    if method == "SparseAdapter":
        module.install_masks(())
    return module


def _sources(folder: Path, model: BackboneConfig) -> Iterator[str]:
    """Write two adapters to start from."""
    for number in range(2):
        source = SparseAdapterModule(
            task=_TASK, backbone=model, adapter=AdapterConfig(kind="pfeiffer"), prune=PruneConfig(sparsity=0.0)
        )
        source.configure_model()
        write_adapter(folder / str(number), source.owned_state(), source.manifest())
        yield str(folder / str(number))


def load_of(arm: Arm, rows: int) -> Load:
    """What a step of an arm on ``rows`` texts or blocks computes on a rank, and what is summed over ranks.

    The arm may be of fewer rows: operations grow with them, and those of the head's few products do too.
    """
    with FlopCounterMode(display=False) as counter:
        arm.loss().backward()
    arm.module.zero_grad()
    parameters: list[Tensor] = list(arm.module.trainable_parameters().values())
    if arm.sharded:  # FSDP gathers each block, and the rest together
        module: Any = arm.module
        parts = len(list(module.sharded_blocks())) + 1
    else:  # gradients are there from the last layer on; DDP's first bucket is a small one, so that sending begins early
        sizes = [_FIRST_BUCKET, _BUCKET]
        parts = len(dist._compute_bucket_assignment_by_size(parameters[::-1], sizes)[0])  # type: ignore[attr-defined]
    return Load(
        flops=counter.get_total_flops() * rows / arm.rows,
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        passes=3 if arm.sharded else 2,
        parts=parts,
    )
