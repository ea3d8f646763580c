"""The comparison before anything is loaded: strict both ways, and every difference is listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peft_lightning.errors import CheckpointError, UsageError

__all__ = ["check_fingerprint", "check_settings", "check_tensors"]


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


def check_settings(recorded: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse settings that a file has decided already, where they differ from what the file records.

    Args:
        recorded: hyper-parameters in the file, plain values.
        here: the module's.
        keys: names, with a dot for a setting inside a group; names that the file lacks are passed over.

    Raises:
        UsageError: names each option with both values.
    """
    before, now = (_flat(values, keys) for values in (recorded, here))
    changed = [key for key in before if before[key] != now.get(key)]
    if changed:
        options = "; ".join(f"{key} = {now.get(key)}, in the checkpoint {before[key]}" for key in changed)
        raise UsageError(f"{options}: the checkpoint decides this; leave the option out")


def _flat(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key in keys:
        group, _, name = key.partition(".")
        inside = values.get(group)
        if isinstance(inside, Mapping):
            flat |= {f"{group}.{n}": _plain(v) for n, v in inside.items() if name in ("", n)}
        elif group in values:
            flat[group] = _plain(inside)
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
