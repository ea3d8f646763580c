"""A digest of a JSON file inside the file itself, so that a changed number in it does not pass for another value.

It guards against damage, not against whoever can write a digest. A file without one is of an earlier version, or was
written by hand, and is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["SEAL", "check_seal", "sealed"]

SEAL = "sha256_of_this"
"""Name of the entry."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with the digest of all of them."""
    plain = {name: value for name, value in content.items() if name != SEAL}
    return {**plain, SEAL: _digest(json.loads(json.dumps(plain)))}


def check_seal(content: Mapping[str, Any]) -> None:
    """Compare what a file says with its own digest, where it has one.

    Raises:
        ValueError: they differ.
    """
    if content.get(SEAL, "") not in ("", _digest({name: value for name, value in content.items() if name != SEAL})):
        raise ValueError("it was changed after it was written (its own SHA-256 differs)")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
