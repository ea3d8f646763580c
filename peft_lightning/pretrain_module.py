"""What all pretraining of masked language models shares: model, tokenizer, evaluation, and the folder at the end.

Everything trains, so a checkpoint holds the whole model, and its tokenizer's files. Evaluation reports the mean
cross-entropy in nats and the share of masked words that are predicted right, over exactly the targets of the corpus.

Shapes: B blocks, S tokens of a block, P targets of a block, D width, N = B P.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_lightning.atomic import fresh_folder
from peft_lightning.backbones.build import BackboneConfig, as_backbone_config, build_masked_lm, fingerprint
from peft_lightning.backbones.options import plain_options
from peft_lightning.backbones.quiet import quiet
from peft_lightning.backbones.tokenizers import load_tokenizer, same_tokens, tokenizer_files, tokenizer_from_files
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.functional.flops import EncoderShape
from peft_lightning.functional.masked_lm import target_scores
from peft_lightning.layers.token_drop import TokenDrop
from peft_lightning.module import MethodModule
from peft_lightning.settings import OptimConfig

__all__ = ["Batch", "PretrainModule"]

Batch = Mapping[str, Tensor]


class PretrainModule(MethodModule):
    """Base of the methods that train on text without labels.

    Batches hold ``input_ids`` int64 ``[B, S]`` without padding, ``targets`` int64 ``[B, P]`` (ascending positions),
    ``labels`` int64 ``[B, P]`` (the words there), and may hold ``valid`` bool ``[B]`` (False: does not count) and
    ``documents`` int64 ``[B, S]`` (tokens see those of their own document only).

    Args:
        backbone: a configuration (random weights), or a folder or hub name to go on from.
        optim: the optimiser's settings.
        chunk: rows of logits that are alive at a time.
        seed: of initial values, dropout and ties.
    """

    monitor = "val/loss"
    """Name of the metric that the best checkpoint has least of."""

    def __init__(
        self, *, backbone: str | BackboneConfig, optim: OptimConfig | Mapping[str, Any], chunk: int, seed: int
    ) -> None:
        super().__init__(optim=optim, seed=seed)
        self.backbone_config = as_backbone_config(backbone)
        if self.backbone_config.dtype != "float32":
            raise UsageError(
                f"backbone.dtype = {self.backbone_config.dtype!r}: pretraining updates the backbone in float32; for "
                "speed use trainer.precision bf16-mixed"
            )
        if self.backbone_config.attention == "eager":
            raise UsageError("backbone.attention = 'eager': pretraining computes attention with sdpa")
        if type(chunk) is not int or chunk < 1:
            raise UsageError(f"chunk = {chunk!r}: must be a whole number, at least 1")
        self.chunk = chunk
        self.tokenizer: Any = None
        self._sums: dict[str, Tensor] = {}
        self.record(backbone=self.backbone_config, chunk=chunk)

    # -- construction ------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> Any:
        """What data without a tokenizer of its own reads text with: the checkpoint's, or the backbone's."""
        config = self.backbone_config
        return self.tokenizer or config.tokenizer_of(config.name, config.tokenizer, config.revision)

    def build(self) -> None:
        """Tokenizer, model, and what drives its layers."""
        self.tokenizer = self._find_tokenizer()
        config = self.backbone_config
        self.model = build_masked_lm(config, self.tokenizer)
        self.identify({key: value for key, value in fingerprint(self.model).items() if key != "weights"})
        self.engine = TokenDrop(self.model, checkpointing=config.gradient_checkpointing)
        # so that a checkpoint, which holds everything, can be read without the corpus and without the folder
        came_from = {"name": None, "revision": None, "tokenizer": None if self.tokenizer else config.tokenizer}
        self.record(backbone={**self.hparams["backbone"], **came_from, "config": plain_options(self.model.config)})

    def _find_tokenizer(self) -> Any:
        """The data's, which is the checkpoint's or the backbone's where there is one; without a trainer, those."""
        given = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        name = self.tokenizer_name
        if isinstance(name, str):
            name = load_tokenizer(name)
        if given is not None and name is not None and not same_tokens(given, name):
            whose = "the checkpoint's" if self.tokenizer is not None else "the backbone's"
            raise UsageError(f"data.tokenizer: its words are not {whose}; leave data.tokenizer out")
        if given is None and name is None and "vocab_size" not in (self.backbone_config.config or {}):
            raise UsageError("backbone: give config.vocab_size or tokenizer, or train with a data module that has one")
        return given or name

    def declared(self) -> Iterator[nn.Module]:
        """The whole model."""
        yield self.model

    def sharded_blocks(self) -> Iterator[tuple[nn.Module, str]]:
        """The transformer's layers, and what computes them."""
        return self.engine.through_methods()

    def summary(self) -> dict[str, Any]:
        """Method, architecture and trained parameters."""
        config: Any = self.model.config
        return {
            "method": type(self).__name__.removesuffix("Module"),
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
            "trained_parameters": sum(p.numel() for p in self.trainable_parameters().values()),
        }

    def shape(self) -> EncoderShape:
        """The numbers that decide what a pass costs."""
        config: Any = self.model.config
        return EncoderShape(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            embedding=getattr(config, "embedding_size", 0),
        )

    def positions(self) -> int:
        """How many tokens the model has positions for."""
        embedding: nn.Embedding = self.engine.bare.embeddings.position_embeddings
        # RoBERTa counts positions from behind the padding's
        return embedding.num_embeddings - (0 if embedding.padding_idx is None else embedding.padding_idx + 1)

    def on_fit_start(self) -> None:
        """Check that the corpus fits the model.

        Raises:
            UsageError: if the tokenizer knows more words than the model embeds, or blocks are longer than it reads.
        """
        self._check_data()

    def on_validation_start(self) -> None:
        """The same for a validation outside a fit; begin with no sums: one that was interrupted may have left some."""
        self._check_data()
        self._sums = {}

    def on_test_start(self) -> None:
        """The same for a test."""
        self.on_validation_start()

    def _check_data(self) -> None:
        words = self.engine.bare.embeddings.word_embeddings.num_embeddings
        if self.tokenizer is not None and len(self.tokenizer) > words:
            raise UsageError(
                f"data.tokenizer: has {len(self.tokenizer)} words, the backbone embeds {words} (config.vocab_size)"
            )
        length = getattr(getattr(self.trainer, "datamodule", None), "block_size", 0)
        if length > self.positions():
            raise UsageError(f"data.block_size = {length}: the backbone has {self.positions()} positions")

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Token numbers, int64 ``[B, S]`` without padding -> scores of all words ``[B, S, V]``, nothing dropped."""
        everywhere_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        hidden_BSD = self.engine(ids_BS, everywhere_BS, None, full=True).teacher
        return self.engine.logits(cast(Tensor, hidden_BSD))

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluated(self, batch: Batch) -> dict[str, Tensor]:
        """Last hidden states ``[B, P, D]`` at the targets, by the prefix of the metrics that they give."""
        passes = self.engine(batch["input_ids"], batch["targets"], None, full=True, mask_BSS=self.sight(batch))
        assert passes.teacher is not None
        return {"": passes.teacher}

    @staticmethod
    def sight(batch: Batch) -> Tensor | None:
        """Bool ``[B, S, S]``: which token may look at which; None: all at all."""
        documents_BS = batch.get("documents")
        return None if documents_BS is None else documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch's losses."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch's losses."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy under ``val/``, and the number of optimizer steps done."""
        self._conclude("val")
        if self.trainer.state.fn == "fit":
            self.log("step", float(self.trainer.global_step), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log loss and accuracy under ``test/``."""
        self._conclude("test")

    def _evaluate(self, batch: Batch) -> None:
        labels_BP = batch["labels"]
        counts_BP = batch["valid"].unsqueeze(1).expand_as(labels_BP) if "valid" in batch else torch.ones_like(labels_BP)
        weight_VD, bias_V = self.engine.output_layer()
        for name, hidden_BPD in self.evaluated(batch).items():
            hidden_ND = self.engine.transform(hidden_BPD).flatten(0, 1)
            losses_N, right_N = target_scores(hidden_ND, weight_VD, bias_V, labels_BP.flatten(), chunk=self.chunk)
            counts_N = counts_BP.flatten().double()
            sums = torch.stack([(losses_N * counts_N).sum(), (right_N * counts_N).sum(), counts_N.sum()])
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _conclude(self, stage: str) -> None:
        for name, sums in self._sums.items():
            loss, right, count = self.summed(sums).unbind()
            shown: dict[str, Any] = {"prog_bar": stage == "val" and not name, "sync_dist": True}
            self.log(f"{stage}/{name}loss", (loss / count).float(), **shown)
            self.log(f"{stage}/{name}accuracy", (right / count).float(), **shown)
        self._sums = {}

    # -- files -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer's files."""
        super().on_save_checkpoint(checkpoint)
        if self.tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer_files(self.tokenizer, self.positions())

    def before_data(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the tokenizer out of a checkpoint, so that the data is read with it.

        Raises:
            CheckpointError: if it is damaged, or the model was built for another one.
        """
        files = checkpoint.get("tokenizer")
        if files is not None and not isinstance(files, dict):
            raise CheckpointError("the tokenizer in the checkpoint is damaged")
        if files and self.tokenizer is None and not self._built:
            self.tokenizer = tokenizer_from_files(files)
        elif files and self.tokenizer is not None and not same_tokens(tokenizer_from_files(files), self.tokenizer):
            raise CheckpointError("checkpoint: was trained with another tokenizer than the data's")

    def export(self, folder: str | Path, *, replace: bool = False, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder of Hugging Face's form: ``config.json``, ``model.safetensors``, and the tokenizer's files.

        ``AutoModelForMaskedLM.from_pretrained`` reads it, and every method takes it as its backbone.

        Args:
            folder: new or empty; it appears when all is written.
            replace: whether a folder that is there gives way.
            state: what :meth:`owned_state` gave, where only one rank writes; by default it is asked for here.

        Raises:
            UsageError: if the folder holds files and may not be replaced.
        """
        self.configure_model()
        model: Any = self.model
        tensors = {n.removeprefix("model."): t for n, t in (state or self.owned_state()).items() if n[:6] == "model."}
        with fresh_folder(folder, replace=replace) as fresh, quiet():
            model.save_pretrained(fresh, state_dict=tensors)
            if self.tokenizer is not None:
                for name, text in tokenizer_files(self.tokenizer, self.positions()).items():
                    (fresh / name).write_text(text, encoding="utf-8")
