"""A backbone with a task's head, loss and metrics: what all methods but pretraining share.

A method adds to :meth:`TaskModule.attach` what it trains inside the backbone and says so in ``declared``; the rest,
from the training step to ``predict``, is here. Shapes: B rows, L tokens, H width, C outputs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from peft_lightning.backbones.build import BackboneConfig, as_backbone_config, build_backbone, fingerprint
from peft_lightning.backbones.pooling import pooling
from peft_lightning.backbones.positions import positions
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.errors import UsageError
from peft_lightning.module import MethodModule
from peft_lightning.settings import OptimConfig
from peft_lightning.tasks.batch import Batch, batch_of_lists, chosen, rows_of
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task, get_task

__all__ = ["TaskModule"]


class TaskModule(MethodModule):
    """Base of the methods that solve a labelled task.

    Args:
        task: name of a row of the task table, or a row.
        backbone: which encoder; a string is a folder or hub name.
        optim: the optimiser's settings.
        head: ``dense`` (dense, tanh, linear), ``linear``, or ``auto``: dense on the token that stands for a text,
            linear on every token, as BERT's are.
        head_dropout: dropout in the head.
        class_weights: one weight per class in the loss, or none.
        max_length: tokens at most in :meth:`predict`.
        seed: of initial values, dropout and ties.

    Raises:
        UsageError: if a value is not allowed.
    """

    def __init__(
        self,
        *,
        task: str | Task | Mapping[str, Any],
        backbone: BackboneConfig | Mapping[str, Any] | str,
        optim: OptimConfig | Mapping[str, Any],
        head: str,
        head_dropout: float,
        class_weights: Sequence[float] | None,
        max_length: int,
        seed: int,
    ) -> None:
        super().__init__(optim=optim, seed=seed)
        self.backbone_config = as_backbone_config(backbone)
        _ = self.backbone_config.tokenizer_name  # without one there is nothing to read texts with
        self._read_as(get_task(task))
        self.head_style = self.kind.style if head == "auto" else head
        self.head_dropout, self.max_length = head_dropout, max_length
        classes = len(self.task.labels)
        if class_weights is not None and (len(class_weights) != classes or not all(w > 0 for w in class_weights)):
            raise UsageError(
                f"class_weights = {list(class_weights)}: must be {classes} numbers above 0, one per class of the task"
                if classes
                else f"class_weights = {list(class_weights)}: must be null, for the task has no classes"
            )
        weights_C = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights_C, persistent=False)
        self.record(
            backbone=self.backbone_config,
            head=self.head_style,
            head_dropout=head_dropout,
            class_weights=None if class_weights is None else list(class_weights),
            max_length=max_length,
        )

    @property
    def tokenizer_name(self) -> str:
        """Folder or hub name of the tokenizer, or ``toy``."""
        return self.backbone_config.tokenizer_name

    @property
    def monitor(self) -> str:
        """Name under which the task's first metric is logged in validation."""
        return f"val/{self.task.metrics[0]}"

    # -- construction ----------------------------------------------------------------------------------------

    def build(self) -> None:
        """Backbone, head, then whatever the method attaches."""
        self.backbone = build_backbone(self.backbone_config)
        self.identify(fingerprint(self.backbone))
        # a tokenizer may give what an architecture has no use for, such as token types
        self._input_names = set(inspect.signature(type(self.backbone).forward).parameters)
        self._pooling = pooling(self.backbone.config)
        self.head = self.kind.head(self.backbone, self.head_style, self.head_dropout)
        self.attach()
        stages = {stage: self.kind.metrics() for stage in ("val", "test")}
        self.metrics = nn.ModuleDict(stages)
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in stages})

    def attach(self) -> None:
        """Put the method's own layers into ``self.backbone``; nothing by default."""

    def declared(self) -> Iterator[nn.Module]:
        """The head; methods add theirs."""
        yield self.head

    def summary(self) -> dict[str, Any]:
        """Method, task, and trained parameters by part."""
        trained = {name: p.numel() for name, p in self.trainable_parameters().items()}
        head = sum(count for name, count in trained.items() if name.startswith("head."))
        return {
            "method": type(self).__name__.removesuffix("Module"),
            "task": self.task.name,
            "trained_parameters": sum(trained.values()),
            "head_parameters": head,
            "backbone_parameters": sum(p.numel() for n, p in self.named_parameters() if n not in trained),
            "kept_share": 1.0,
        }

    def lines(self) -> dict[str, str]:
        """What a report shows of the method's own decisions, row by row; nothing by default."""
        return {}

    def on_fit_start(self) -> None:
        """Check that the data's tokens are words of the backbone, and no more than it has positions for.

        Raises:
            UsageError: if the tokenizer knows more words than the backbone embeds, or rows may be longer.
        """
        data = getattr(self.trainer, "datamodule", None)
        tokenizer = getattr(data, "tokenizer", None)
        words = cast(Any, self.backbone.config).vocab_size
        if tokenizer is not None and len(tokenizer) > words:
            raise UsageError(
                f"backbone.tokenizer = {self.tokenizer_name!r}: has {len(tokenizer)} words, the backbone embeds {words}"
            )
        self._check_length(getattr(data, "max_length", 0))

    def setup(self, stage: str) -> None:
        """Check that module and data mean the same labels, and keep the examples that the data shows beside each text.

        Raises:
            UsageError: if the kind or the classes differ.
        """
        super().setup(stage)
        task = getattr(getattr(self.trainer, "datamodule", None), "task", self.task)
        if (task.kind, task.labels) != (self.task.kind, self.task.labels):
            raise UsageError(
                f"task: the data is {task.name} ({task.kind}: {', '.join(task.labels)}), "
                f"the module is for {self.task.name} ({self.task.kind}: {', '.join(self.task.labels)})"
            )
        if task.options.get("shots") and not self.task.options.get("shots"):
            self._read_as(dataclasses.replace(self.task, options=task.options))

    def _read_as(self, task: Task) -> None:
        self.task, self.kind = task, build_kind(task)
        self.kind.tokenizer_name = self.tokenizer_name
        self.record(task=task)

    def positions(self) -> int | None:
        """How many tokens the backbone has positions for, or None where there is no such limit."""
        return positions(self.backbone)

    def _check_length(self, max_length: int) -> None:
        most = self.positions()
        if most is not None and max_length > most:
            raise UsageError(f"max_length = {max_length}: the backbone has {most} positions")

    # -- steps -----------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs, int64 ``[N, L]`` each -> what the kind makes of the head's scores: fp32 ``[B, C]``, or as it says."""
        return self.kind.outputs(cast(Tensor, self.head(self.states(inputs))), inputs)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the head reads: ``[N, L, H]``; ``[N, 1, H]`` where that is the last token's state."""
        known = {name: tensor for name, tensor in inputs.items() if name in self._input_names}
        return self.pooled(self.backbone(**known).last_hidden_state, inputs)

    def pooled(self, hidden_NLH: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the head reads of the last layer's states, as :meth:`states` gives it."""
        if self._pooling == "last" and not self.kind.per_token:
            mask_NL = inputs["attention_mask"]
            last_N = (mask_NL * torch.arange(1, mask_NL.shape[1] + 1, device=mask_NL.device)).argmax(dim=1)
            hidden_NLH = hidden_NLH[torch.arange(len(last_N), device=last_N.device), last_N].unsqueeze(1)
        return hidden_NLH

    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        """What :meth:`forward` takes of a batch with labels."""
        return self.kind.inputs(batch, self.backbone.config)

    def head_loss(self, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch's rows and sum of their weights, from what the head reads."""
        outputs = self.kind.outputs(cast(Tensor, self.head(states)), batch["inputs"])
        losses_B, weights_B = self.kind.losses(outputs, batch, self.class_weights)
        return losses_B.sum(), weights_B.sum()

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch's rows and sum of their weights, fp32 scalars."""
        return self.head_loss(self.states(self.inputs(batch)), batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, normalised over all ranks."""
        return self.normalised(*self.batch_loss(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update loss and metrics under ``val/``."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log validation under the number of optimizer steps done, as training is."""
        if self.trainer.state.fn == "fit":
            self.log("step", float(self.trainer.global_step), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update loss and metrics under ``test/``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One plain mapping per row of the batch, with its row number in the split."""
        answers = self._answers(batch)
        if "rows" in batch:
            rows = batch["rows"].tolist()
            answers = [{"row": row, **answer} for row, answer in zip(rows, answers, strict=True)]
        valid = batch["valid"].tolist() if "valid" in batch else [True] * len(answers)
        return [answer for answer, ok in zip(answers, valid, strict=True) if ok]

    def _answers(self, batch: Batch) -> list[dict[str, Any]]:
        outputs = torch.empty(0) if self.kind.generates else self(batch["inputs"])
        return self.kind.answers(outputs, batch, self)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        outputs = self(self.inputs(batch))
        losses_B, weights_B = self.kind.losses(outputs, batch, self.class_weights)
        valid_B = batch["valid"] if "valid" in batch else torch.ones_like(losses_B, dtype=torch.bool)
        count = int(valid_B.sum())  # a rank's row of padding does not count
        metrics = cast(MetricCollection, self.metrics[stage])
        mean_loss = cast(MeanMetric, self.losses[stage])
        if count:
            weight = weights_B[valid_B].sum()
            # rows may weigh nothing, such as a sentence that the tokenizer leaves no word of
            mean_loss.update(losses_B[valid_B].sum() / weight.clamp_min(torch.finfo(torch.float32).tiny), weight)
            found = self.kind.predictions(outputs, batch, self), self.kind.truths(batch)
            metrics.update(*(chosen(values, valid_B) for values in found))
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": max(1, count)}
        self.log(f"{stage}/loss", mean_loss, **options)
        for name, metric in metrics.items(keep_base=True):
            shown = stage == "val" and name == self.task.metrics[0]
            self.log(f"{stage}/{name}", cast(Any, metric), prog_bar=shown, **options)

    # -- use -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, texts: Sequence[Any], batch_size: int = 32) -> list[dict[str, Any]]:
        """Answers for texts, without a Trainer.

        Args:
            texts: strings, or pairs of strings for a task over two texts, or rows as mappings.
            batch_size: rows per forward pass.

        Returns:
            One mapping per text, in order, as the task's kind answers: ``label`` and ``probabilities`` for
            classification, ``score`` for a regression.

        Raises:
            UsageError: if a text does not have the parts that the task reads.
            DataError: if a part is of the wrong type.
        """
        self.configure_model()
        self._check_length(self.max_length)
        tokenizer = load_tokenizer(self.tokenizer_name)
        rows = rows_of(texts, self.task.text, self.kind.required())
        was_training = self.training
        self.eval()
        answers: list[dict[str, Any]] = []
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            columns = {name: [row.get(name) for row in chunk] for name in self.kind.columns(labelled=False)}
            encoded = self.kind.encode(columns, tokenizer, self.max_length, labelled=False, references=True)
            batch = batch_of_lists(encoded, pad_token_id=tokenizer.pad_token_id)
            answers += self._answers(move_data_to_device(batch, self.device))
        self.train(was_training)
        return answers
