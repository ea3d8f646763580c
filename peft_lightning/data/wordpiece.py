"""A WordPiece tokenizer with BERT's special tokens, trained on a corpus once and kept.

WordPiece: Schuster and Nakajima, 2012, https://doi.org/10.1109/ICASSP.2012.6289079; texts are split into words and
lower-cased as BERT does it. The same corpus gives the same tokenizer on any machine. The library alone does not
promise that: it numbers the letters that continue words in the order of a hash table, and these numbers decide
between pairs that are equally frequent. So we give it the letters in our order.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from peft_lightning.data.cache import cache_key
from peft_lightning.data.documents import Corpus
from peft_lightning.data.lock import build_once
from peft_lightning.errors import DataError
from peft_lightning.reading.limits import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["FEWEST_WORDS", "trained_tokenizer"]

# Below, there is no room for the letters of a language and the numbers of its alphabet.
FEWEST_WORDS = 300
_FORMAT = 1
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUES = "##"
# Most letters that are words of their own; rarer ones become unknown. As BERT's own trainer has it.
_MOST_LETTERS = 1000
_log = logging.getLogger(__name__)


def trained_tokenizer(corpus: Corpus, vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of ``corpus``, from the file in ``folder`` where that is whole.

    Args:
        corpus: what it is trained on.
        vocab_size: most words, with the special ones; at least ``FEWEST_WORDS``.
        folder: made if needed.

    Raises:
        DataError: the corpus has no text, or cannot be read, or ``folder`` cannot be written.
    """
    path = folder / f"{cache_key({'wordpiece': _FORMAT, 'corpus': corpus.digest, 'vocab_size': vocab_size})}.json"

    def build(file: BinaryIO) -> None:
        _log.info("training a tokenizer on %s", corpus.name)
        content = _train(corpus, vocab_size).encode()
        file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)

    return _with_roles(build_once(path, _read, build))


def _read(path: Path) -> str:
    digest, _, content = read_bytes(path).partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise ValueError("its checksum differs")
    return content.decode()


def _train(corpus: Corpus, vocab_size: int) -> str:
    from tokenizers import trainers

    trained = _untrained({"[UNK]": 0})
    letters = _letters(corpus, trained.normalizer, min(_MOST_LETTERS, (vocab_size - len(_SPECIAL)) // 3))
    if not letters:
        raise DataError(f"{corpus.name}: has no text; allowed: some to train a tokenizer on")
    continuing = [f"{_CONTINUES}{letter}" for letter in letters if _may_continue(letter, trained)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        # Special ones get their numbers first; only ours stay special.
        special_tokens=[*_SPECIAL, *continuing],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=_CONTINUES,
        show_progress=False,
    )
    trained.train_from_iterator((piece.text for piece in corpus.read()), trainer)
    return str(_untrained(trained.get_vocab(with_added_tokens=False)).to_str())


def _untrained(vocabulary: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=_CONTINUES))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUES)
    if all(token in vocabulary for token in _SPECIAL):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def _letters(corpus: Corpus, normalizer: Any, most: int) -> list[str]:
    """Return the most frequent characters but spaces, the most frequent one first."""
    counts: Counter[str] = Counter()
    for piece in corpus.read():
        counts.update(normalizer.normalize_str(piece.text))
    found = [(-count, letter) for letter, count in counts.items() if not letter.isspace()]
    return [letter for _, letter in sorted(found)[:most]]


def _may_continue(letter: str, tokenizer: Any) -> bool:
    """Whether a letter may stand inside a word: a comma is a word of its own."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{letter}"))) == 1


def _with_roles(content: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
