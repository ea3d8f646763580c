"""A digest of a JSON file inside the file itself, so that a changed number in it does not pass for another value.

It guards against damage, not against whoever can write a digest. A file without one is of an earlier version, or was
written by hand, and is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["SEAL", "sealed", "unseal"]

SEAL = "sha256_of_this"
"""Name of the entry."""

_LENGTH = 64  # of a SHA-256 in hexadecimal digits


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with the digest of all of them."""
    plain = _without(SEAL, content)
    return {**plain, SEAL: _digest(json.loads(json.dumps(plain)))}


def unseal(content: dict[str, Any]) -> None:
    """Take the digest out of what a file says, where it has one that agrees with the rest.

    Raises:
        ValueError: they differ, or the digest is there under another name.
    """
    seal = content.pop(SEAL, "")
    # one byte of the name is no less likely to be damaged than one of the values
    names = (
        [] if seal else [name for name, value in content.items() if isinstance(value, str) and len(value) == _LENGTH]
    )
    named_otherwise = any(content[name] == _digest(_without(name, content)) for name in names)
    if named_otherwise or seal not in ("", _digest(content)):
        raise ValueError("it was changed after it was written (its own SHA-256 differs)")


def _without(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
