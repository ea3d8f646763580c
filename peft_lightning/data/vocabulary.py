"""What packing and masking need to know of a tokenizer: its special tokens, and which words start one.

Shapes: V one more than the highest token number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_lightning.errors import UsageError

__all__ = ["Vocabulary", "read_vocabulary"]

_NEEDED = ("cls", "sep", "mask", "pad")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Numbers of a tokenizer, and what turns texts into them.

    Attributes:
        first: [CLS] or its like.
        separator: [SEP] or its like.
        mask: [MASK] or its like.
        unknown: [UNK] or its like, if there is one.
        ordinary_V: bool, which numbers are words, and no special tokens.
        encoder: a ``tokenizers.Tokenizer`` that neither cuts nor pads, and takes special tokens in a text for text.
        digest: changes when the tokens of a text may.
    """

    first: int
    separator: int
    mask: int
    unknown: int | None
    ordinary_V: np.ndarray
    encoder: Any
    digest: str

    def starts(self) -> np.ndarray:
        """Return bool [V]: whether a token starts a word, rather than continues the one before.

        In WordPiece a prefix (``##``) marks what continues; with a byte-level vocabulary or SentencePiece a sign for
        the space marks what starts, so that a comma goes with its word, and so does what follows a special token.

        Raises:
            UsageError: the tokenizer marks neither.
        """
        content = json.loads(self.encoder.to_str())
        model = content["model"]["type"]
        prefix = content["model"].get("continuing_subword_prefix")
        other = json.dumps([content["pre_tokenizer"], content["decoder"]])
        starts = np.ones(len(self.ordinary_V), bool)
        if model == "WordLevel":
            return starts
        if model == "WordPiece" and prefix:
            marks = (prefix, False)
        elif '"ByteLevel"' in other:
            marks = ("\u0120", True)
        elif '"Metaspace"' in other or "\u2581" in other:
            marks = ("\u2581", True)
        else:
            raise UsageError(
                f"whole_words is true; allowed with a tokenizer that shows where words start, not with this {model} one"
            )
        mark, means_start = marks
        for token, number in self.encoder.get_vocab().items():
            starts[number] = token.startswith(mark) == means_start or not self.ordinary_V[number]
        return starts


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """Return what is to be known of ``tokenizer``, which stays as it is.

    Raises:
        UsageError: it is no fast tokenizer, or lacks a special token.
    """
    name = getattr(tokenizer, "name_or_path", "")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"tokenizer is {name or tokenizer!r}; allowed: a fast tokenizer")
    if lacking := [f"{part}_token" for part in _NEEDED if getattr(tokenizer, f"{part}_token_id", None) is None]:
        raise UsageError(f"tokenizer {name!r} has no {', '.join(lacking)}; allowed: one that has")
    encoder = type(backend).from_str(backend.to_str())
    # Left there by whoever saved or called it.
    encoder.no_truncation()
    encoder.no_padding()
    numbers = list(encoder.get_vocab().values())
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in encoder.get_added_tokens_decoder().items() if token.special}
    ordinary_V = np.zeros(max(numbers) + 1, bool)
    ordinary_V[numbers] = True
    ordinary_V[sorted(special)] = False
    if not ordinary_V.any():
        raise UsageError(f"tokenizer {name!r} has no words but its special tokens; allowed: one that has")
    roles = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id]
    content = json.loads(encoder.to_str())
    deciding = [content["model"], content["normalizer"], content["pre_tokenizer"], content["added_tokens"]]
    encoder.encode_special_tokens = True
    return Vocabulary(
        first=roles[0],
        separator=roles[1],
        mask=roles[2],
        unknown=roles[3],
        ordinary_V=ordinary_V,
        encoder=encoder,
        digest=hashlib.sha256(json.dumps([*deciding, roles, sorted(special)], sort_keys=True).encode()).hexdigest(),
    )
