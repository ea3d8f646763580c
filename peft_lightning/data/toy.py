"""A small generated language, so that every command and test runs offline in seconds.

The three tasks need a relation between words, not one word: ``toy_sentiment`` asks for the tone of a judgement that
a negation turns round, ``toy_pairs`` whether two sentences speak of the same animal, ``toy_similarity`` how many of
four things two sentences share. Labels are balanced, and no example of one split occurs in another one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peft_lightning.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DETERMINERS = ("the", "this", "that")
_ANIMALS = ("cat", "dog", "horse", "fish", "mouse", "cow")
_COLOURS = ("red", "black", "white", "brown")
_GOOD = ("good", "kind", "clever", "brave", "lovely", "calm")
_BAD = ("bad", "rude", "silly", "lazy", "ugly", "wild")
_NEGATIONS = ("not", "never", "hardly")
_VERBS = ("sleeps", "runs", "eats", "plays")
_PLACES = ("garden", "river", "house", "forest")
_GLUE_WORDS = ("is", "and", "in")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = (
    *_DETERMINERS, *_ANIMALS, *_COLOURS, *_GOOD, *_BAD, *_NEGATIONS, *_VERBS, *_PLACES, *_GLUE_WORDS,
)  # fmt: skip

TOY_VOCABULARY = (
    *_SPECIAL,
    *_WORDS,
    # A multiple of 8 keeps the matrix products of a masked-language-model head aligned.
    *(f"[unused{i}]" for i in range(-(len(_SPECIAL) + len(_WORDS)) % 8)),
)

_SIZES = {"train": 2048, "validation": 256, "test": 256}
# Shares of the space of examples, in eighths: what makes the splits disjoint.
_EIGHTHS = {"train": range(2, 8), "validation": range(0, 1), "test": range(1, 2)}


def _scene(rng: random.Random, animal: str) -> str:
    verb, place, colour = rng.choice(_VERBS), rng.choice(_PLACES), rng.choice(_COLOURS)
    return f"{rng.choice(_DETERMINERS)} {colour} {animal} {verb} in {rng.choice(_DETERMINERS)} {place}"


def _sentiment(rng: random.Random) -> dict[str, Any]:
    label, negated = rng.randrange(2), rng.randrange(2)
    tone = rng.choice(_GOOD if label != negated else _BAD)
    negation = f"{rng.choice(_NEGATIONS)} " if negated else ""
    judgement = f"{rng.choice(_DETERMINERS)} {rng.choice(_ANIMALS)} is {negation}{tone}"
    clauses = [judgement, _scene(rng, rng.choice(_ANIMALS))]
    rng.shuffle(clauses)
    return {"text": " and ".join(clauses[: rng.choice((1, 2, 2))] if clauses[0] is judgement else clauses), "label": label}


def _pairs(rng: random.Random) -> dict[str, Any]:
    label = rng.randrange(2)
    first, other = rng.sample(_ANIMALS, 2)
    return {
        "sentence1": _scene(rng, first),
        "sentence2": _scene(rng, first if label else other),
        "label": label,
    }


def _similarity(rng: random.Random) -> dict[str, Any]:
    score = rng.randrange(5)
    shared = set(rng.sample(range(4), score))
    sentences: list[list[str]] = [[], []]
    for number, words in enumerate((_COLOURS, _ANIMALS, _VERBS, _PLACES)):
        first, other = rng.sample(words, 2)
        sentences[0].append(first)
        sentences[1].append(first if number in shared else other)
    texts = ["the {} {} {} in the {}".format(*words) for words in sentences]
    return {"sentence1": texts[0], "sentence2": texts[1], "label": float(score)}


_TASKS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "toy_sentiment": _sentiment,
    "toy_pairs": _pairs,
    "toy_similarity": _similarity,
}


def toy_rows(task: str, split: str, size: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``size`` examples; the same arguments always give the same ones.

    Raises:
        UsageError: there is no such toy task or split.

    >>> toy_rows("toy_sentiment", "train", size=1) == toy_rows("toy_sentiment", "train", size=2)[:1]
    True
    """
    if task not in _TASKS:
        raise UsageError(f"task is {task!r}; allowed for generated data: {', '.join(_TASKS)}")
    if split not in _SIZES:
        raise UsageError(f"split is {split!r}; allowed for generated data: {', '.join(_SIZES)}")
    rng = random.Random(f"{task}/{split}/{seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < (_SIZES[split] if size is None else size):
        row = _TASKS[task](rng)
        text = " ".join(str(value) for name, value in row.items() if name != "label")
        if zlib.crc32(text.encode()) % 8 in _EIGHTHS[split]:
            rows.append(row)
    return rows


@lru_cache(maxsize=1)
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the toy language: one token per word, ``[CLS] a [SEP] b [SEP]`` with token types."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(TOY_VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
