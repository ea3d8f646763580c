"""The comparison before anything is loaded: strict both ways, and every difference is listed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_lightning.errors import CheckpointError

__all__ = ["check_fingerprint", "check_tensors"]


def check_tensors(given: Mapping[str, Any], expected: Mapping[str, Tensor], what: str) -> None:
    """Compare names, shapes and dtypes both ways.

    Raises:
        CheckpointError: lists every missing, unexpected and mis-shaped tensor (the first few of each).
    """
    wrong = []
    for name in given.keys() & expected.keys():
        have, want = given[name], expected[name]
        if not isinstance(have, Tensor) or have.shape != want.shape or have.dtype != want.dtype:
            shown = f"{tuple(have.shape)} {have.dtype}" if isinstance(have, Tensor) else type(have).__name__
            wrong.append(f"{name} ({shown}, expected {tuple(want.shape)} {want.dtype})")
    parts = [
        f"{kind} {len(names)}: {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
        for kind, names in (
            ("missing", expected.keys() - given.keys()),
            ("unexpected", given.keys() - expected.keys()),
            ("different", wrong),
        )
        if names
    ]
    if parts:
        raise CheckpointError(f"{what}: tensors do not fit this module; {'; '.join(parts)}")


def check_fingerprint(given: Mapping[str, Any] | None, expected: Mapping[str, Any], what: str) -> None:
    """Compare the backbone that a file was made on with the one at hand.

    Raises:
        CheckpointError: lists what differs: another depth, width or architecture, or the same with other weights.
    """
    given = given or {}
    keys = [key for key in {**expected, **given} if given.get(key) != expected.get(key)]
    shape = [f"{key} {given.get(key)} here {expected.get(key)}" for key in keys if key != "weights"]
    if shape:
        raise CheckpointError(f"{what}: belongs to another backbone ({'; '.join(shape)})")
    if keys:
        raise CheckpointError(f"{what}: belongs to a backbone of the same shape with other weights")
