"""A cell trained by an ordinary Trainer in this process, as ``peft-lightning fit`` does it, nothing on the disk."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.study.evaluation import Scores, evaluate
from peft_lightning.study.loop import LoopTrainer, computing, prepare
from peft_lightning.study.outcome import LOSSES, BestEpoch, Outcome, Tick
from peft_lightning.task_module import TaskModule

__all__ = ["run_alone"]


def run_alone(
    module: TaskModule,
    data: FewShotDataModule,
    *,
    device: torch.device,
    precision: str,
    epochs: int | None,
    steps: int | None = None,
    select: str,
    tick: Tick,
) -> Outcome:
    """Train a built module, or only take it to its first step where there are no epochs, and measure it.

    Args:
        module: of any method.
        data: its own.
        device: where.
        precision: 32-true or bf16-mixed.
        epochs: how many, or None.
        steps: of the optimiser, instead.
        select: last or best.
        tick: told of progress.

    Raises:
        PeftLightningError: whatever goes wrong.
    """
    loop = LoopTrainer(data, device, precision, epochs, steps)
    best = BestEpoch(module, loop.max_epochs)
    watch = _Watch(module, data, device, precision, select, best, tick, loop.max_epochs)
    taken = 0
    if loop.max_steps:
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=loop.max_epochs,
            max_steps=-1 if steps is None else steps,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[watch],
        )
        trainer.fit(module, datamodule=data)
        taken = trainer.global_step
        module.to(device)  # where a Trainer does not leave it
        best.restore()
    else:
        prepare(module, loop)
    dev, test = (watch.scores(stage) for stage in ("validation", "test"))
    tick(1.0)
    return Outcome(
        dev=dev,
        test=test,
        losses=[float(loss) for loss in watch.losses],
        steps=taken,
        epoch=best.epoch,
        skipped=module.skipped_steps,
        trained_parameters=int(module.summary()["trained_parameters"]),
    )


class _Watch(L.Callback):
    """Keeps the first losses and, where it is asked for, the best epoch."""

    def __init__(
        self,
        module: TaskModule,
        data: FewShotDataModule,
        device: torch.device,
        precision: str,
        select: str,
        best: BestEpoch,
        tick: Tick,
        epochs: int,
    ) -> None:
        self.module, self.data, self.device, self.precision = module, data, device, precision
        self.select, self.best, self.tick, self.epochs = select, best, tick, epochs
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *batch: Any) -> None:
        """Keep a loss."""
        if len(self.losses) < LOSSES:
            self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the dev shots."""
        if self.select == "best":
            self.best.offer(trainer.current_epoch + 1, self.scores("validation"))
            self.module.train()
        self.tick((trainer.current_epoch + 1) / (self.epochs + 1))

    def scores(self, stage: str) -> Scores:
        """Those of the module as it is."""
        self.module.eval()
        with computing(self.precision, self.device):
            (found,) = evaluate([self.module], [self.data], stage)
        return found
