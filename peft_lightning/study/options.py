"""Checks of what a grid gives: mappings with known names, lists of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_lightning.checks import nearest
from peft_lightning.errors import UsageError

__all__ = ["check_known", "check_lengths", "check_numbers", "mapping"]


def mapping(values: Any, where: str) -> Mapping[str, Any]:
    """Return ``values``.

    Raises:
        UsageError: they are no mapping.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where} = {values!r:.100}: must be a mapping")
    return values


def check_known(given: Any, allowed: Sequence[str], where: str) -> None:
    """Refuse a mapping with a name that is not ``allowed``, or no mapping.

    Raises:
        UsageError: names it, what is allowed, and what was perhaps meant.
    """
    if odd := [name for name in mapping(given, where) if name not in allowed]:
        raise UsageError(f"{where} has no option {odd[0]!r}{nearest(odd[0], allowed)}; allowed: {', '.join(allowed)}")


def check_lengths(settings: Any, group: str) -> None:
    """Check ``lr``, ``epochs``, ``steps`` and ``precision`` of a grid or a method; None is none given.

    Raises:
        UsageError: one has a value that is not allowed, or both epochs and steps are given.
    """
    for name, kind, least in (("lr", float, 0), ("epochs", int, 0), ("steps", int, 1)):
        if getattr(settings, name) is not None:
            check_numbers(f"{group}.{name}", getattr(settings, name), kind, least)
    if settings.epochs is not None and settings.steps is not None:
        raise UsageError(f"{group}.epochs = {settings.epochs}, {group}.steps = {settings.steps}: give one of them")
    if settings.precision not in (None, "32-true", "bf16-mixed"):
        raise UsageError(f"{group}.precision = {settings.precision!r}: must be 32-true or bf16-mixed")


def check_numbers(option: str, values: Sequence[Any], kind: type, least: int) -> None:
    """Check a list of different numbers: whole ones from ``least`` on, or floats above it.

    Raises:
        UsageError: it is something else.
    """
    kinds: tuple[type, ...] = (int, float) if kind is float else (int,)
    good = all(type(value) in kinds and (value > least if kind is float else value >= least) for value in values)
    if not values or not good or len(set(values)) < len(values):
        what = "numbers above 0" if kind is float else f"whole numbers, at least {least}"
        raise UsageError(f"{option} = {values!r}: must be a list of different {what}")
