"""Settings check the types of their own fields: a file or a caller may give anything."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin, get_type_hints

from peft_lightning.errors import UsageError

__all__ = ["check_choices", "check_types", "nearest"]


def check_types(settings: Any, group: str) -> None:
    """Compare the fields of a dataclass with their annotations: plain types, optional ones, tuples and dicts.

    A whole number passes for a float; True does not pass for 1, and no float may be infinite or NaN.

    Args:
        settings: an instance.
        group: what its options are called, as ``prune``.

    Raises:
        UsageError: names the option, the value and the type.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not _fits(value, hint):
            wanted = str(hint) if get_origin(hint) else hint.__name__
            raise UsageError(f"{group}.{field.name} = {value!r}: must be of type {wanted}, and finite")


def check_choices(settings: Any, group: str, **choices: tuple[str, ...]) -> None:
    """Compare fields with what they may be; None passes where the field may be None.

    Args:
        settings: an instance of a dataclass.
        group: what its options are called.
        choices: field -> allowed values.

    Raises:
        UsageError: names the option, the value and what is allowed.
    """
    hints = get_type_hints(type(settings))
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed and not (value is None and _fits(None, hints[name])):
            raise UsageError(f"{group}.{name} = {value!r}: must be one of {', '.join(allowed)}")


def nearest(name: Any, allowed: Sequence[str]) -> str:
    """Return a question that names what was perhaps meant, or nothing.

    >>> nearest("optm", ["head", "optim"])
    " (did you mean 'optim'?)"
    """
    found = get_close_matches(str(name), allowed, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is tuple:
        parts = get_args(hint)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)
