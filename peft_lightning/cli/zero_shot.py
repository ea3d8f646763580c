"""Validation, test and predictions without any training: which commands may, and with which models."""

from __future__ import annotations

import sys

import lightning as L

from peft_lightning.cli.recorded import option
from peft_lightning.errors import UsageError
from peft_lightning.task_module import TaskModule

__all__ = ["check_zero_shot", "require_checkpoint"]


def require_checkpoint(words: list[str]) -> None:
    """Every command but ``fit`` works on a checkpoint, given as a flag; ask for it before the parser asks for a model.

    ``--zero_shot true`` stands for none: the model is as it begins.

    Raises:
        UsageError: if there is none, or both, and the words do not just ask for help or the configuration.
    """
    asks = any(word in ("-h", "--help") or ".help" in word or "print_config" in word for word in words)
    zero_shot = str(option(words, "--zero_shot")).lower() == "true"
    if zero_shot and words[0] == "fit":
        raise UsageError("--zero_shot: is for validate, test and predict; fit trains")
    if zero_shot and option(words, "--ckpt_path"):
        raise UsageError("--zero_shot and --ckpt_path: give one of them")
    if words[0] != "fit" and not asks and not zero_shot and not option(words, "--ckpt_path"):
        raise UsageError(f"{words[0]}: give --ckpt_path, the checkpoint to {words[0]}")


def check_zero_shot(module: L.LightningModule) -> None:
    """Say what the answers of a model that nothing has trained are worth.

    Raises:
        UsageError: if it solves no task.
    """
    if not isinstance(module, TaskModule):
        raise UsageError(f"--zero_shot: {type(module).__name__} solves no task that could be tested")
    if module.task.kind != "prompt":
        sys.stdout.write(f"note: the head of kind {module.task.kind} is new; nothing has taught it to answer\n")
