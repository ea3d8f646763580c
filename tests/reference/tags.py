"""Tags of words, sub-words and entities, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def encoded(words: Sequence[str], tags: Sequence[int], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """What a tokenizer of [CLS] ... [SEP] makes of a sentence: each word for itself, cut at the end."""
    tokens, numbers, labels = [], [], []
    for place, word in enumerate(words):
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        for piece in range(len(pieces)):
            tokens.append(pieces[piece])
            numbers.append(place + 1 if piece == 0 else -place - 1)
            labels.append(tags[place] if piece == 0 else -100)
    most = max_length - 2
    return {
        "input_ids": [tokenizer.cls_token_id, *tokens[:most], tokenizer.sep_token_id],
        "token_words": [0, *numbers[:most], 0],
        "labels": [-100, *labels[:most], -100],
    }


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last word of each entity, read as CoNLL's script does."""
    found = set()
    for first, tag in enumerate(tags):
        before = tags[first - 1] if first else "O"
        if tag == "O" or (tag[0] == "I" and before[1:] == tag[1:]):
            continue
        last = first
        while last + 1 < len(tags) and tags[last + 1] == f"I{tag[1:]}":
            last += 1
        found.add((tag[2:], first, last))
    return found


def frequent(sentences: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], order: Sequence[str]) -> dict[str, str]:
    """The tag that each word mostly has, the first in ``order`` of several."""
    usual = {}
    for word in {word for words in sentences for word in words}:
        pairs = [pair for words, part in zip(sentences, tags, strict=True) for pair in zip(words, part, strict=True)]
        counts = Counter(tag for other, tag in pairs if other == word)
        usual[word] = max(order, key=lambda tag: counts[tag])
    return usual
