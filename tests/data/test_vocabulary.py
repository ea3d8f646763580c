"""What is known of a tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_lightning.backbones.tokenizers import tokenizer_files, tokenizer_from_files
from peft_lightning.backbones.toy import TOY_WORDS, toy_tokenizer
from peft_lightning.data.vocabulary import read_vocabulary
from peft_lightning.errors import UsageError

ROLES = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>", "unk_token": "<unk>"}


def made(backend: Tokenizer, **roles: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens."""
    given = {name: token for name, token in {**ROLES, **roles}.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def numbered(*tokens: str) -> dict[str, int]:
    """Tokens and their numbers."""
    return {token: number for number, token in enumerate(tokens)}


def byte_level() -> Tokenizer:
    """A byte-level vocabulary as GPT-2 and RoBERTa have it."""
    backend = Tokenizer(models.BPE(numbered(*ROLES.values(), "a", "b", ",", "\u0120", "\u0120a", "\u0120b"), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_piece() -> Tokenizer:
    """A SentencePiece vocabulary."""
    scores = [(token, -1.0) for token in (*ROLES.values(), "\u2581", "\u2581a", "a", "b")]
    backend = Tokenizer(models.Unigram(scores, unk_id=4))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece() -> Tokenizer:
    """A WordPiece vocabulary."""
    backend = Tokenizer(models.WordPiece(numbered(*ROLES.values(), "a", "##a", "#", "b"), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def test_toy() -> None:
    tokenizer = toy_tokenizer()
    vocabulary = read_vocabulary(tokenizer)
    assert [vocabulary.first, vocabulary.separator, vocabulary.mask, vocabulary.unknown] == [2, 3, 4, 1]
    assert vocabulary.ordinary_V.tolist() == [False] * 5 + [True] * (len(tokenizer) - 5)
    text = " ".join(word for words in TOY_WORDS.values() for word in words)
    assert vocabulary.encoder.encode(text).ids[1:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("backend", "starting"),
    [
        (word_piece(), ["a", "#", "b"]),
        (byte_level(), ["\u0120", "\u0120a", "\u0120b"]),
        (sentence_piece(), ["\u2581", "\u2581a"]),
        (Tokenizer(models.WordLevel(numbered(*ROLES.values(), "a", "##a"), unk_token="<unk>")), ["a", "##a"]),
    ],
    ids=["WordPiece", "byte level", "SentencePiece", "words"],
)
def test_what_starts_a_word(backend: Tokenizer, starting: list[str]) -> None:
    vocabulary = read_vocabulary(made(backend))
    numbers = backend.get_vocab()
    expected = {*starting, *ROLES.values()}
    assert {token for token, number in numbers.items() if vocabulary.starts()[number]} == expected


def test_tokenizer_that_does_not_say_where_words_start() -> None:
    vocabulary = read_vocabulary(made(Tokenizer(models.BPE(numbered(*ROLES.values(), "a"), []))))
    with pytest.raises(UsageError, match="whole_words is true; allowed with a tokenizer that shows where words start"):
        vocabulary.starts()


def test_special_tokens_are_not_ordinary_wherever_they_are_named() -> None:
    backend = word_piece()
    backend.add_special_tokens(["<extra>"])
    backend.add_tokens(["usual"])
    tokenizer = made(backend)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<more>"]})
    numbers = tokenizer.get_vocab()
    ordinary = read_vocabulary(tokenizer).ordinary_V
    assert {token for token, number in numbers.items() if not ordinary[number]} == {
        *ROLES.values(),
        "<extra>",
        "<more>",
    }


def test_numbers_without_a_word_are_not_ordinary() -> None:
    words = {**numbered(*ROLES.values()), "a": 9, "b": 7}
    vocabulary = read_vocabulary(made(Tokenizer(models.WordLevel(words, unk_token="<unk>"))))
    assert np.flatnonzero(vocabulary.ordinary_V).tolist() == [7, 9]


def test_text_is_neither_cut_nor_padded_nor_special() -> None:
    tokenizer = toy_tokenizer()
    tokenizer("the cat", padding="max_length", truncation=True, max_length=5)
    encoder = read_vocabulary(tokenizer).encoder
    cat, unknown = tokenizer.convert_tokens_to_ids(["cat", "[UNK]"])
    encodings = encoder.encode_batch_fast(["cat " * 20, "cat"], add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == [[cat] * 20, [cat]]
    assert {*encoder.encode("cat [MASK] [SEP]", add_special_tokens=False).ids} == {cat, unknown}
    # The tokenizer itself stays as it was.
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5
    assert tokenizer("[MASK]", add_special_tokens=False)["input_ids"] == [tokenizer.mask_token_id]


def test_digest_follows_what_decides_about_tokens() -> None:
    base = made(word_piece())
    lower, roles, more, longer = (made(word_piece()) for _ in range(4))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    roles.sep_token = "<pad>"
    more.add_tokens(["c"])
    longer("a", padding="max_length", truncation=True, max_length=5)
    digests = [read_vocabulary(tokenizer).digest for tokenizer in (base, lower, roles, more, longer)]
    assert len(set(digests)) == 4 and digests[0] == digests[4]
    saved = tokenizer_from_files(tokenizer_files(base))
    assert read_vocabulary(saved).digest == digests[0]


# -- what is refused


@pytest.mark.parametrize("role", ["cls", "sep", "mask", "pad"])
def test_missing_special_token(role: str) -> None:
    with pytest.raises(UsageError, match=f"tokenizer '' has no {role}_token; allowed: one that has"):
        read_vocabulary(made(word_piece(), **{f"{role}_token": None}))


def test_several_missing_special_tokens() -> None:
    tokenizer = made(word_piece(), cls_token=None, mask_token=None)
    with pytest.raises(UsageError, match="has no cls_token, mask_token; allowed"):
        read_vocabulary(tokenizer)


@pytest.mark.parametrize("tokenizer", [5, "toy", object()])
def test_no_fast_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"tokenizer is .*; allowed: a fast tokenizer"):
        read_vocabulary(tokenizer)


def test_nothing_but_special_tokens() -> None:
    with pytest.raises(UsageError, match="has no words but its special tokens; allowed: one that has"):
        read_vocabulary(made(Tokenizer(models.WordLevel(numbered(*ROLES.values()), unk_token="<unk>"))))
