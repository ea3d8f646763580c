"""Full fine-tuning: the baseline beside which every other method is reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.backbones.families import family_of
from peft_lightning.errors import UsageError
from peft_lightning.settings import OptimConfig
from peft_lightning.task_module import TaskModule
from peft_lightning.tasks.table import Task

__all__ = ["FineTuneModule"]


class FineTuneModule(TaskModule):
    """Trains the whole backbone and the task's head.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        optim: the optimiser's settings.
        head: ``dense`` (dense, tanh, linear), ``linear``, or ``auto``: dense on the token that stands for a text,
            linear on every token.
        head_dropout: dropout in the head.
        class_weights: one weight per class in the loss.
        max_length: tokens at most in ``predict``.
        seed: of initial values and dropout.

    Raises:
        UsageError: if a value is not allowed.
    """

    def __init__(
        self,
        task: str | Task,
        backbone: str | BackboneConfig,
        optim: OptimConfig = OptimConfig(lr=1e-4),
        head: str = "auto",
        head_dropout: float = 0.1,
        class_weights: Sequence[float] | None = None,
        max_length: int = 128,
        seed: int = 42,
    ) -> None:
        super().__init__(
            task=task,
            backbone=backbone,
            optim=optim,
            head=head,
            head_dropout=head_dropout,
            class_weights=class_weights,
            max_length=max_length,
            seed=seed,
        )
        if self.backbone_config.dtype != "float32":
            raise UsageError(
                f"backbone.dtype = {self.backbone_config.dtype!r}: full fine-tuning updates the backbone in float32; "
                "for speed use trainer.precision bf16-mixed"
            )

    def declared(self) -> Iterator[nn.Module]:
        """Everything."""
        yield self.backbone
        yield self.head

    def sharded_blocks(self) -> Iterator[tuple[nn.Module, str]]:
        """The transformer's layers; each computes by its forward pass."""
        config: Any = self.backbone.config
        for path in family_of(config.model_type).layers(config):
            yield self.backbone.get_submodule(path), "forward"
