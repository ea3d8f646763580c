"""What is refused before a trainer is built or its processes start, and what one of them says when another is gone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from peft_lightning.errors import UsageError

__all__ = ["check_launcher", "check_options", "check_processes", "lost_peer"]

_DEVICES = r"auto|-1|0*[1-9]\d*|\[?\d+\]|\d+,|\[?\d+(, ?\d+)+\]?"
_STRATEGIES = "auto|ddp|ddp_find_unused_parameters_(true|false)|fsdp2"
# What gloo, NCCL and their store say when the other end of a connection is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe", "recvValue")


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse restarts that would wait for ever: of torchrun, which shares its agent's store with the processes.

    Those that come back find the addresses of those before them there (pytorch/pytorch issues 135712 and 167288).

    Args:
        environment: of this process.

    Raises:
        UsageError: says what to set.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts.isdigit() and int(restarts) and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UsageError(
            f"torchrun --max-restarts = {restarts}: processes that come back would look for those that are gone; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --rdzv-backend=c10d or --standalone, or leave it at 0"
        )


def check_options(options: Any) -> None:
    """Refuse options that the command line decides, or that Lightning would take otherwise or stumble over.

    Args:
        options: parsed, of one command.

    Raises:
        UsageError: names the option, its value and what is allowed.
    """
    trainer = options.trainer
    if trainer.default_root_dir is not None:
        raise UsageError("--trainer.default_root_dir: the run's folder is chosen by --run_dir")
    for name, value in (
        ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches),
        ("save_every_n_steps", options.get("save_every_n_steps", 1)),
    ):
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{name} = {value}: must be at least 1")
    if not re.fullmatch(_DEVICES, str(trainer.devices)):
        raise UsageError(
            f"--trainer.devices = {trainer.devices}: must be auto, -1 for all, a number from 1, or a list of numbers"
        )
    if isinstance(trainer.strategy, str) and not re.fullmatch(_STRATEGIES, trainer.strategy):
        raise UsageError(f"--trainer.strategy = {trainer.strategy}: must be auto, ddp or fsdp2")
    seed = options.seed_everything
    if isinstance(seed, bool) or not 0 <= seed < 1 << 32:  # a drawn seed could not be repeated or gone on with
        raise UsageError(f"--seed_everything = {seed}: must be a number, at least 0 and below {1 << 32}")


def check_processes(trainer: L.Trainer, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a job whose processes would wait for others that nobody starts, or that they could not find.

    Args:
        trainer: not yet running.
        environment: of this process.

    Raises:
        UsageError: says what starts the others.
    """
    asked, there = trainer.num_devices * trainer.num_nodes, environment.get("WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" in environment and there.isdigit() and int(there) != asked:
        raise UsageError(
            f"trainer.devices x trainer.num_nodes = {trainer.num_devices} x {trainer.num_nodes}: torchrun has started "
            f"{there} processes (--nproc-per-node x --nnodes); must be as many"
        )
    here = environment.get("LOCAL_WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" in environment and here.isdigit() and int(here) != trainer.num_devices:
        raise UsageError(
            f"trainer.devices = {trainer.num_devices} on each of trainer.num_nodes = {trainer.num_nodes}: torchrun has "
            f"started {here} processes on this node (--nproc-per-node); must be as many"
        )
    if trainer.world_size == 1 or not isinstance(
        getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment
    ):
        return
    known = {"NODE_RANK", "GROUP_RANK"} & {*environment} and {"MASTER_ADDR", "MASTER_PORT"} <= {*environment}
    if trainer.num_nodes > 1 and not known:
        raise UsageError(
            f"trainer.num_nodes = {trainer.num_nodes}: nothing here starts the other nodes; use torchrun on each node, "
            "or srun (configs/cluster has both), or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
        )
    if "LOCAL_RANK" in environment and "MASTER_PORT" not in environment:
        raise UsageError(
            f"LOCAL_RANK = {environment['LOCAL_RANK']} in the environment says that another program starts the "
            f"{trainer.world_size} processes of this job, but there is no MASTER_PORT by which they would find each "
            "other: unset LOCAL_RANK, or use torchrun"
        )


def lost_peer(error: BaseException) -> str:
    """What to say of an error that another process of the job has caused by ending; empty if it is none of these."""
    text = shorten(str(error), 200)
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in _GONE):
        return ""
    return (
        "another process of this job has ended, so this one ends too; why is in that one's output (killed, or out of "
        f"memory, if there is nothing); with --resume auto the job goes on from its last checkpoint ({text})"
    )
