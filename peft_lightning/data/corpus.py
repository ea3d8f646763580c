"""The data of masked-language-model pretraining, from unlabelled texts to corrupted blocks.

Texts (``data/documents.py``) are tokenised and packed once into a file that all processes share (``data/pack.py``).
Masks are drawn anew each time a block is read in training, and are always the same in evaluation
(``data/collate.py``).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from peft_lightning.data.cache import cache_folder
from peft_lightning.data.collate import MaskingCollate
from peft_lightning.data.documents import Corpus, held_out_part, open_corpus
from peft_lightning.data.loader import Loader
from peft_lightning.data.module import SplitDataModule, share, switch, within
from peft_lightning.data.pack import Blocks, packed
from peft_lightning.data.vocabulary import Vocabulary, read_vocabulary
from peft_lightning.data.wordpiece import FEWEST_WORDS, trained_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.functional.corruption import MOST_POSITIONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORTEST = 16
# A share of unknown tokens above which a tokenizer does not speak the language of the texts.
_MANY = 0.2
_log = logging.getLogger(__name__)


class MLMDataModule(SplitDataModule):
    """Read, pack and mask a corpus. ``data/collate.py`` says what a batch holds.

    Args:
        inputs: files (``.txt``, ``.text``, ``.md``, ``.parquet``, ``.jsonl``, ``.json``), folders or hub names, one or
            several; texts that ship with Python if null. A folder is read with the folders in it, without hidden ones.
            It may name its files, or the folders in it, train, validation and test.
        validation: the same for the validation split, where ``inputs`` has none or another one is wanted.
        tokenizer: a folder, a hub name or ``toy``, from Python also a tokenizer. If null, the one that the module's
            backbone or checkpoint brings, or else a WordPiece tokenizer that is trained on the training texts.
        vocab_size: most words of a tokenizer that is trained.
        block_size: tokens of a block, [CLS] included.
        batch_size: blocks per batch and rank in training; what does not fill a global batch waits for another epoch.
        eval_batch_size: the same in validate and test; ``batch_size`` if null.
        mask_rate: targets of a block over its tokens; their number is rounded, and at least 1. Blocks with fewer
            words are left out, with a warning.
        whole_words: whether the pieces of a word become targets together. The last word chosen may be cut, so that
            the number stays exact.
        separate_documents: whether batches say which document a token is of, so that tokens see their own only.
        held_out: share of the documents that validation gets where nothing else is named for it; at least one, or
            a part of the only one.
        seed: seeds the order and the masks of training.
        workers: processes that prepare batches.
        cache_dir: keeps packed corpora and trained tokenizers; ``$PEFT_LIGHTNING_CACHE`` or the user's cache if null.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    stages = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}

    def __init__(
        self,
        inputs: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        block_size: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        mask_rate: float = 0.15,
        whole_words: bool = False,
        separate_documents: bool = False,
        held_out: float = 0.05,
        seed: int = 42,
        workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.validation, self.cache_dir = inputs, validation, cache_dir
        self.vocab_size = within("vocab_size", vocab_size, FEWEST_WORDS)
        self.block_size = within("block_size", block_size, _SHORTEST, MOST_POSITIONS)
        self.batch_size = within("batch_size", batch_size, 1)
        self.eval_batch_size = within("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1)
        self.mask_rate, self.held_out = share("mask_rate", mask_rate), share("held_out", held_out)
        self.whole_words = switch("whole_words", whole_words)
        self.separate_documents = switch("separate_documents", separate_documents)
        self.seed, self.workers = within("seed", seed, 0), within("workers", workers, 0)
        self._given = tokenizer
        # From what was chosen to what it led to.
        self._read: tuple[Any, PreTrainedTokenizerBase, Vocabulary] | None = None
        self._opened: dict[str, Corpus | None] = {}
        self._blocks: dict[tuple[str, str], Blocks] = {}

    @property
    def targets(self) -> int:
        """Number of targets of every block, P."""
        return max(1, round(self.mask_rate * self.block_size))

    @property
    def vocabulary(self) -> int:
        """Number of words of the tokenizer, V."""
        return len(cast(Any, self.tokenizer))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer of the data; it is trained if none was given and it is not in the cache.

        Raises:
            UsageError: it cannot be used for blocks of this size.
            DataError: it is to be trained, and the corpus or the cache cannot be used.
        """
        return self._language()[0]

    def _language(self) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
        """Return the tokenizer of the module at hand, which may be another one than in an earlier fit."""
        choice: Any = self._given
        if choice is None:
            choice = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer_name", None)
        # A module that had none takes over ours.
        if self._read is None or not any(choice is known or choice == known for known in self._read[:2]):
            tokenizer: Any = choice
            if choice is None:
                tokenizer = trained_tokenizer(self._corpus("train"), self.vocab_size, cache_folder(self.cache_dir))
            elif isinstance(choice, str):
                from peft_lightning.backbones.tokenizers import load_tokenizer

                tokenizer = load_tokenizer(choice)
            vocabulary = read_vocabulary(tokenizer)
            if self.block_size > (most := tokenizer.model_max_length):
                raise UsageError(f"block_size is {self.block_size}; allowed with this tokenizer: at most {most}")
            self._read = choice, tokenizer, vocabulary
        return self._read[1:]

    def _corpus(self, split: str) -> Corpus:
        """Return the documents of a split, from wherever they come."""
        corpus, given = self._inputs(split), self.validation is not None
        if split == "test":
            return corpus or self._corpus("validation")
        if split == "validation" and given:
            corpus = open_corpus(self.validation, "validation", unmarked="validation")
        elif not given and self._inputs("validation") is None and (whole := self._inputs("train")):
            return held_out_part(whole, self.held_out, inside=split == "validation")
        if corpus is None:
            raise DataError(f"{'inputs' if split == 'train' else 'validation'} has no documents for {split}")
        return corpus

    def _inputs(self, split: str) -> Corpus | None:
        # Opening reads all of it once, for its digest.
        if split not in self._opened:
            self._opened[split] = open_corpus(self.inputs, split)
        return self._opened[split]

    def load(self, split: str) -> Blocks:
        """Return the packed blocks of a split.

        Raises:
            DataError: the corpus or the cache cannot be used, or most blocks have too few words for their targets.
        """
        _, vocabulary = self._language()
        key = split, vocabulary.digest
        if key not in self._blocks:
            corpus = self._corpus(split)
            blocks = packed(corpus, vocabulary, self.block_size, cache_folder(self.cache_dir))
            if blocks.unknown > _MANY and getattr(self.trainer, "is_global_zero", True):
                _log.warning("%.0f %% of the tokens of %s are unknown to the tokenizer", 100 * blocks.unknown, split)
            self._blocks[key] = self._with_targets(blocks, corpus.name)
        return self._blocks[key]

    def _with_targets(self, blocks: Blocks, name: str) -> Blocks:
        """Return the blocks that have words for all targets: the same ones wherever they are read."""
        usable = blocks.having(self.targets)
        if not (lost := len(blocks) - len(usable)):
            return usable
        what = f"{lost} of {len(blocks)} blocks have fewer than {self.targets} tokens that are words, one a target"
        if 2 * lost > len(blocks):
            most = blocks.words(0.5)
            allowed = ["another tokenizer"] if blocks.unknown > _MANY or not most else []
            allowed += [f"below {(most + 0.5) / self.block_size:.3f}"] if most else []
            raise DataError(
                f"{name}: {100 * blocks.unknown:.0f} % of the tokens are unknown to the tokenizer; {what};"
                f" mask_rate is {self.mask_rate}, allowed here: {' or '.join(allowed)}"
            )
        if getattr(self.trainer, "is_global_zero", True):
            _log.warning("%s: %s; they are left out", name, what)
        return usable

    def loader(self, split: str) -> Loader:
        """Return this rank's batches of a split."""
        blocks, training = self.load(split), split == "train"
        batch_size = self.batch_size if training else self.eval_batch_size
        lengths = np.full(len(blocks), self.block_size)
        sampler = self.sampler(lengths, batch_size, shuffle=training, seed=self.seed, whole=True)
        collate = MaskingCollate(
            blocks,
            self._language()[1],
            targets=self.targets,
            batch_size=batch_size,
            seed=self.seed if training else None,
            batches=len(sampler),
            whole_words=self.whole_words,
            separate_documents=self.separate_documents,
        )
        stream = self._stream() if training else None
        return Loader(collate, sampler, epoch=self.epoch(), workers=self.workers, stream=stream)

    def _stream(self) -> dict[str, int | bool | str]:
        """Return what decides the training batches, as messages call it."""
        digest = self._language()[1].digest
        stream: dict[str, int | bool | str] = {
            "the texts to train on": self._corpus("train").digest,
            "the tokenizer": digest,
            "block_size": self.block_size,
            "the number of targets (mask_rate x block_size)": self.targets,
            "whole_words": self.whole_words,
            "separate_documents": self.separate_documents,
            "seed": self.seed,
        }
        if ("validation", digest) in self._blocks:
            stream["the texts to validate on"] = self._corpus("validation").digest
        return stream
