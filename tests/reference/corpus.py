"""A slow oracle of packing: all documents in memory, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def blocks_of(documents: Sequence[str], tokenizer: Any, block_size: int) -> list[list[int]]:
    """All blocks, with the tokenizer called as anybody would."""
    stream: list[int] = []
    for text in documents:
        if ids := tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]:
            stream += [*ids, tokenizer.sep_token_id]
    size = block_size - 1
    return [[tokenizer.cls_token_id, *stream[i * size :][:size]] for i in range(len(stream) // size)]
