"""A JSON file's digest inside of it: damage is found, also that of the digest's own name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.seal import SEAL, sealed, unseal

CONTENT: dict[str, Any] = {"a": 1, "b": [0.5, "two"], "sha256": "0" * 64}


def test_what_was_sealed_is_read_without_it() -> None:
    content = json.loads(json.dumps(sealed(CONTENT)))
    assert len(content[SEAL]) == 64
    unseal(content)
    assert content == CONTENT
    unseal(content)  # an earlier version's, or a person's
    assert content == CONTENT


def test_any_flipped_bit_is_found() -> None:
    text = json.dumps(sealed(CONTENT)).encode()
    refused = 0
    for position in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[position // 8] ^= 1 << position % 8
        try:
            found = parse_json(bytes(flipped))
        except ValueError:  # no JSON any more
            continue
        with pytest.raises(ValueError, match="it was changed after it was written"):
            unseal(found)
        refused += 1
    assert refused > 500
