"""Whose classes a file may name: those of a few packages, and of modules that the user names.

A configuration, a grid or a checkpoint says by a path which class it wants. To look a path up is to import its module,
which runs it; so the path is compared with the packages below before anything is imported, and what it leads to has to
be a subclass of what is expected before anything is made of it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from peft_lightning.errors import UsageError, first_line

__all__ = ["PACKAGES", "find_class", "named_by_user", "trust", "trusted"]

PACKAGES = ("peft_lightning", "lightning", "torch", "transformers")
"""Packages whose classes may be named."""

_named: list[str] = []


def trust(modules: Iterable[str]) -> None:
    """Import modules that the user named, also from the current folder; their classes may be named from now on.

    Raises:
        UsageError: one cannot be imported.
    """
    for module in modules:
        if not module or not all(part.isidentifier() for part in module.split(".")):
            raise UsageError(f"--import = {module!r}: must be a module's name, as my_package.my_module")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # behind all others, so that no file there hides a package
        try:
            importlib.import_module(module)
        except Exception as error:  # the user's own code may fail in any way
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"--import = {module!r}: cannot be imported ({what})") from error
        if module not in _named:
            _named.append(module)


def trusted() -> list[str]:
    """The packages, and the modules that were named."""
    return [*PACKAGES, *_named]


def named_by_user(module: str) -> bool:
    """Whether the user trusts a module: it was named, or is inside of one that was."""
    return any(module == name or module.startswith(f"{name}.") for name in _named)


def find_class(path: str, base: type[Any], what: str) -> type[Any]:
    """The class at a path.

    Args:
        path: ``package.module.Class``, of a trusted package, of a named module, or of one that is imported already.
        base: what it has to be a subclass of.
        what: the option, for messages.

    Raises:
        UsageError: the path is of another package, or leads to something else.
    """
    module, _, name = path.rpartition(".")
    known = any(module == package or module.startswith(f"{package}.") for package in trusted())
    if not known and module not in sys.modules:
        raise UsageError(
            f"{what} = {path!r}: is of none of the packages {', '.join(trusted())}, so it is not imported; "
            f"--import {module or 'MODULE'} trusts its module"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UsageError(f"{what} = {path!r}: cannot be imported ({first_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{what} = {path!r}: must be a subclass of {base.__module__}.{base.__name__}")
    return found
