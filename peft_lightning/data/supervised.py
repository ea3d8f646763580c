"""The data of a supervised task, from raw rows to batches.

Each split is tokenised once and kept in the cache (``data/cache.py``). Training reads batches grouped by
length in a random order per epoch; evaluation reads each row once, the longest first (``data/loader.py``).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from peft_lightning.data.cache import Encoded, cache_folder
from peft_lightning.data.collate import PaddingCollate
from peft_lightning.data.encode import encode_split
from peft_lightning.data.loader import Batch, Loader
from peft_lightning.data.module import SplitDataModule, within
from peft_lightning.data.source import Source, open_source
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# A share of unknown tokens above which a tokenizer does not speak the language of the data.
_MANY = 0.2
_AT_ONCE = 256
_log = logging.getLogger(__name__)


class TaskDataModule(SplitDataModule):
    """Read, encode and batch the splits of a task.

    Args:
        task: a name from the table, or the fields of a task.
        tokenizer: a folder, a hub name or ``toy``, from Python also a tokenizer; the module's own if null.
        root: a folder that holds the task's folder, or its files.
        rows: from Python, a list of dicts or a ``datasets.Dataset`` per split; comes before ``root``.
        splits: from a stage (train, validation, test, predict) to the split it reads, where not the task's own.
        batch_size: rows per batch and rank in training; a row may be several sequences, such as windows or choices.
        eval_batch_size: the same in validate, test and predict; ``batch_size`` if null.
        max_length: number of tokens to which a text or a pair is cut.
        seed: seeds the order of training.
        workers: processes that prepare batches.
        cache_dir: keeps the encoded splits; ``$PEFT_LIGHTNING_CACHE`` or the user's cache if null.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    stages = {
        "fit": ("train", "validation"),
        "validate": ("validation",),
        "test": ("test",),
        "predict": ("predict",),
    }

    def __init__(
        self,
        task: str | Task,
        tokenizer: str | None = None,
        root: str | None = None,
        rows: Any = None,
        splits: dict[str, str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_length: int = 128,
        seed: int = 42,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(splits, Mapping | None):
            raise UsageError(f"splits is {splits!r}; allowed: a mapping from stages to splits, or null")
        chosen = get_task(task)
        self.task = dataclasses.replace(chosen, splits={**chosen.splits, **(splits or {})})
        self.kind = build_kind(self.task)
        if rows is not None and not isinstance(rows, Mapping):
            raise UsageError(f"rows is a {type(rows).__name__}; allowed: a mapping from splits to their rows")
        if not isinstance(root, str | os.PathLike | None):
            raise UsageError(f"root is {root!r}; allowed: a folder that exists, or null")
        self.root, self.rows, self.cache_dir = root, rows, cache_dir
        self.batch_size = within("batch_size", batch_size, 1)
        self.eval_batch_size = within("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1)
        self.max_length = within("max_length", max_length, 8)
        self.seed, self.workers = within("seed", seed, 0), within("workers", workers, 0)
        self._tokenizer = tokenizer
        self._loaded: dict[str, Any] = {}
        self._encoded: dict[tuple[str, Any], Encoded] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the data.

        Raises:
            UsageError: none is known, it cannot be used for batches, or it reads less than ``max_length``.
        """
        tokenizer: Any = self._tokenizer_choice
        if isinstance(tokenizer, str):
            from peft_lightning.backbones.tokenizers import load_tokenizer

            name = tokenizer
            if name not in self._loaded:
                self._loaded[name] = load_tokenizer(name)
            tokenizer = self._loaded[name]
        if not callable(tokenizer):
            raise UsageError(f"tokenizer is {tokenizer!r}; allowed: a folder, a hub name, toy, or a tokenizer")
        if tokenizer.pad_token_id is None:
            raise UsageError(f"tokenizer {tokenizer.name_or_path!r} has no padding token; allowed: one that has")
        if self.max_length > tokenizer.model_max_length:
            most = tokenizer.model_max_length
            raise UsageError(f"max_length is {self.max_length}; allowed with this tokenizer: at most {most}")
        return cast("PreTrainedTokenizerBase", tokenizer)

    def predict_dataloader(self) -> Loader:
        """Return the batches to predict of this rank, without labels."""
        return self.loader("predict")

    def calibration_dataloader(self, stage: str = "train") -> Loader:
        """Return this rank's batches of a stage's rows in a random order, each row once over all ranks, without labels.

        For what looks at inputs only; rows need no label, and loaders of the stage itself stay where they are.

        Raises:
            UsageError: an option leads to no data.
            DataError: the data cannot be used.
        """
        data = self.unlabelled(stage)
        sampler = self.sampler(data.lengths(), self.batch_size, shuffle=True, seed=self.seed, every=True)
        return Loader(self._collate(data), sampler, workers=self.workers)

    def unlabelled(self, stage: str) -> Encoded:
        """Return the encoded rows of a stage without labels; raises as :meth:`load` does."""
        key = (stage, (self._tokenizer_choice, "without labels"))
        if key not in self._encoded:
            self._encoded[key] = encode_split(
                self.source(stage),
                self.kind,
                self.tokenizer,
                max_length=self.max_length,
                labelled=False,
                references=False,
                folder=cache_folder(self.cache_dir),
            )
        return self._encoded[key]

    def labels(self, stage: str) -> Tensor:
        """Return all labels of ``stage`` (train, validation or test), in the order of its rows.

        [N], or [N, K] for a kind with K labels a row, -100 where a row has fewer.

        Raises:
            DataError: the stage has no labels, or its data cannot be used.
        """
        if stage not in self.task.splits or stage == "predict":
            raise DataError(f"the stage {stage!r} has no labels; allowed: train, validation, test")
        # A copy, since the cache is mapped read-only.
        data = self.load(stage)
        if "labels" in data.scalars:
            return torch.from_numpy(data.scalars["labels"].copy())
        values, offsets = data.ragged["labels"]
        rows = [torch.from_numpy(part.astype("int64")) for part in np.split(values, offsets[1:-1])]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def batches(self, stage: str) -> Iterator[dict[str, Any]]:
        """Yield all rows of ``stage`` in order, a few at a time, as one process reads them.

        Raises:
            DataError: its data cannot be used.
        """
        data = self.load(stage)
        collate = self._collate(data)
        for number, start in enumerate(range(0, len(data), _AT_ONCE)):
            rows = np.arange(start, min(start + _AT_ONCE, len(data)))
            yield collate(Batch(rows, rows, 0, number, True))

    @property
    def _tokenizer_choice(self) -> Any:
        """What was given, or else what the module at hand names: it may be another one than in an earlier fit."""
        if self._tokenizer is not None:
            return self._tokenizer
        return getattr(getattr(self.trainer, "lightning_module", None), "tokenizer_name", None)

    def source(self, split: str) -> Source:
        """Return the raw rows of a stage; a subclass may choose among them.

        Raises:
            UsageError: an option leads to no data.
            DataError: the split is missing, ambiguous or unreachable.
        """
        return open_source(self.task, split, self.rows, self.root)

    def load(self, split: str) -> Encoded:
        """Return the encoded rows of a stage: train, validation, test or predict.

        Raises:
            UsageError: an option leads to no data.
            DataError: the data cannot be used.
        """
        key = (split, self._tokenizer_choice)
        if key not in self._encoded:
            self._encoded[key] = encode_split(
                self.source(split),
                self.kind,
                self.tokenizer,
                max_length=self.max_length,
                labelled=split != "predict",
                references=split != "train",
                folder=cache_folder(self.cache_dir),
            )
            self._warn_of_unknown_words(split, self._encoded[key])
        return self._encoded[key]

    def _collate(self, data: Encoded) -> PaddingCollate:
        return PaddingCollate(data, pad_token_id=int(cast(int, self.tokenizer.pad_token_id)))

    def _warn_of_unknown_words(self, stage: str, data: Encoded) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        share = float((data.ragged["input_ids"][0] == unknown).mean()) if unknown is not None else 0.0
        if share > _MANY and getattr(self.trainer, "is_global_zero", True):
            _log.warning("%.0f %% of the tokens of %s are unknown to the tokenizer", 100 * share, stage)

    def loader(self, split: str) -> Loader:
        """Return this rank's batches of a stage."""
        data, training = self.load(split), split == "train"
        batch_size = self.batch_size if training else self.eval_batch_size
        sampler = self.sampler(data.lengths(), batch_size, shuffle=training, seed=self.seed)
        collate = self._collate(data)
        stream: dict[str, int | bool | str] = {"the rows as they are encoded": data.digest, "seed": self.seed}
        if (held_out := self._encoded.get(("validation", self._tokenizer_choice))) is not None:
            stream["the rows to validate on, as they are encoded"] = held_out.digest
        return Loader(collate, sampler, epoch=self.epoch(), workers=self.workers, stream=stream if training else None)
