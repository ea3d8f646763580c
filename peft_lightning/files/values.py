"""Values of foreign files, which may be anything: their types are checked before they mean something."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, isfinite

from peft_lightning.errors import CheckpointError

__all__ = ["check_booleans", "check_finite", "check_known", "is_number", "refuse"]


def check_booleans(config: Mapping[str, Any], keys: Collection[str], what: str | Path) -> None:
    """The values of these keys are true or false, where they are there.

    Raises:
        CheckpointError: names the key and the value.
    """
    for key in keys:
        if not isinstance(config.get(key, False), bool):
            raise CheckpointError(f"{what}: {key} = {_shown(config[key])}: must be true or false")


def check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """No value is infinite or NaN.

    Raises:
        CheckpointError: names the first tensor.
    """
    for name, tensor in tensors.items():
        if not bool(isfinite(tensor).all()):
            raise CheckpointError(f"{folder}: {name} has values that are not finite")


def check_known(config: Mapping[str, Any], known: Collection[str], what: str | Path) -> None:
    """Keys that nobody knows say nothing: they are switched off.

    Raises:
        CheckpointError: names the key and the value.
    """
    for key in config.keys() - set(known):
        if config[key] not in (None, False, [], {}, 0):
            raise CheckpointError(f"{what}: {key} = {_shown(config[key])}: is not known here, so it must be off (null)")


def is_number(value: Any) -> bool:
    """Whether a value is a number that is finite and of a sane size; True is none."""
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


def refuse(what: str | Path, key: str, value: Any, allowed: str) -> NoReturn:
    """Say that a value cannot be represented.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(f"{what}: {key} = {_shown(value)}: cannot be represented here; must be {allowed}")


def _shown(value: Any) -> str:
    shown = " ".join(str(value).split())
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
