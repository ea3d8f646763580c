"""From the rows of a batch to its tensors: padded texts of a task, or corrupted blocks of a corpus.

A collate is a function of the batch alone, so it does not matter which process calls it, or when.

Shapes: B rows of a batch, L tokens of its longest row, S tokens of a block, P targets of a block, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peft_lightning.data.cache import Encoded
from peft_lightning.data.loader import Batch
from peft_lightning.data.pack import Blocks
from peft_lightning.data.vocabulary import Vocabulary
from peft_lightning.functional.corruption import corrupt, uniform
from peft_lightning.tasks.batch import make_batch

# Part of the key of all draws, so that those of training and of evaluation have nothing in common.
_TRAINING, _EVALUATION = 1, 2


class PaddingCollate:
    """Make ``{"inputs": {"input_ids", "attention_mask", ...}, "labels", "references", "rows", "valid"}`` of a task.

    What the first three hold: ``tasks/batch.py``. [B] each for the row numbers and whether a row counts.

    Args:
        data: the encoded split.
        pad_token_id: fills ``input_ids`` up to the longest row of the batch.
    """

    def __init__(self, data: Encoded, pad_token_id: int) -> None:
        self.data, self.pad_token_id = data, pad_token_id

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Return the tensors of ``batch``."""
        scalars, ragged = self.data.gather(batch.rows)
        result = make_batch(scalars, ragged, pad_token_id=self.pad_token_id)
        result["rows"] = torch.from_numpy(batch.rows)
        result["valid"] = torch.full((len(batch.rows),), batch.valid)
        return result


class MaskingCollate:
    """Make a corrupted batch of blocks, always of the same shape.

    - ``input_ids`` int64 [B, S]: what the model sees. There is no padding, so there is no attention mask.
    - ``targets`` int64 [B, P]: the positions to predict, ascending. ``labels`` int64 [B, P]: what stood there.
    - ``noise`` float32 [B, S] in [0, 1): breaks ties between tokens of equal importance.
    - ``rows`` int64 [B]: the blocks' numbers. ``valid`` bool [B]: whether a row counts; where evaluation has fewer
      rows than B left, its first one is repeated and does not count.
    - ``documents`` int64 [B, S], on request: tokens may look at each other where it is equal. [SEP] belongs to the
      document that it ends, [CLS] to the first one.

    In training, all draws follow from the seed, the step and the row's place in the global batch. In evaluation they
    follow from the block's number alone: masks are the same each time, in each run, for any number of ranks.

    Args:
        blocks: the packed corpus.
        vocabulary: of the tokenizer that made them.
        targets: P.
        batch_size: B.
        seed: of training; None for evaluation.
        batches: per epoch in training, to count steps.
        whole_words: whether all pieces of a word are chosen together.
        separate_documents: whether ``documents`` is wanted.
    """

    def __init__(
        self,
        blocks: Blocks,
        vocabulary: Vocabulary,
        *,
        targets: int,
        batch_size: int,
        seed: int | None = None,
        batches: int = 0,
        whole_words: bool = False,
        separate_documents: bool = False,
    ) -> None:
        self.blocks, self.targets, self.batch_size = blocks, targets, batch_size
        self.seed, self.batches, self.separate_documents = seed, batches, separate_documents
        # Only numbers are kept: a worker has no use for the tokenizer.
        self.mask, self.separator = vocabulary.mask, vocabulary.separator
        self.ordinary_V = vocabulary.ordinary_V
        self.starts_V = vocabulary.starts() if whole_words else None

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Return the tensors of ``batch``."""
        missing = self.batch_size - len(batch.rows)
        rows_B = np.concatenate([batch.rows, np.repeat(batch.rows[:1], missing)])
        key: tuple[int, ...] = (_EVALUATION,)
        places_B = rows_B
        if self.seed is not None:
            key = (_TRAINING, self.seed, batch.epoch * self.batches + batch.number)
            places_B = np.concatenate([batch.places, np.zeros(missing, np.int64)])
        ids_BS = self.blocks.rows(rows_B)
        corrupted = corrupt(
            *(ids_BS, self.targets, places_B, key),
            mask_id=self.mask,
            ordinary_V=self.ordinary_V,
            starts_V=self.starts_V,
        )
        result = {
            "input_ids": corrupted.ids,
            "targets": corrupted.targets,
            "labels": corrupted.labels,
            "noise": uniform(places_B, ids_BS.shape[1], key),
            "rows": rows_B,
            "valid": (np.arange(self.batch_size) < len(batch.rows)) & batch.valid,
        }
        if self.separate_documents:
            result["documents"] = _documents(ids_BS, self.separator)
        return {name: torch.from_numpy(values) for name, values in result.items()}


def _documents(ids_BS: np.ndarray, separator: int) -> np.ndarray:
    """Return the number of separators before each token, int64 [B, S]; the first token is none, whatever it is."""
    documents_BS = np.zeros(ids_BS.shape, np.int64)
    np.cumsum(ids_BS[:, 1:-1] == separator, axis=1, out=documents_BS[:, 2:])
    return documents_BS
