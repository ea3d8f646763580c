"""YAML is looked through before it is read: names for names can make a small file fill the memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _actions, _typehints, _util

from peft_lightning.errors import UsageError, first_line
from peft_lightning.reading.limits import read_bytes

__all__ = ["check_yaml", "read_yaml", "restrict_values"]

_MOST_BYTES = 1 << 22
_MOST_VALUES = 100_000
_DEEPEST = 60
_LONGEST_NUMBER = 1000
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds, in plain values.

    Raises:
        UsageError: it is missing, no YAML, or too large.
    """
    text = check_yaml(path)
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _refused(path, f"is no YAML ({_plain(error)})") from None


def check_yaml(path: str | Path) -> str:
    """The text of a YAML file that is not too large, written out with every name in it replaced.

    Raises:
        UsageError: it is missing, no YAML, or too large.
    """
    try:
        text = read_bytes(Path(path), _MOST_BYTES).decode("utf-8-sig")
        _count(text)
    except FileNotFoundError:
        raise _refused(path, "there is no such file") from None
    except UnicodeDecodeError as error:
        raise _refused(path, f"is no YAML (it is not UTF-8: {error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise _refused(path, f"is no YAML ({_plain(error)})") from None
    except (OSError, ValueError) as error:
        raise _refused(path, f"cannot be read ({first_line(error)})") from None
    return text


def restrict_values(parser: jsonargparse.ArgumentParser) -> None:
    """Have the values of options taken as they stand; by itself the parser reads a file that one names.

    What ``--config`` names is looked through before; such a file would not be. A text that is YAML is, here.

    Args:
        parser: with all its options but those that take one word.
    """
    for action in parser._actions:
        if isinstance(action, _typehints.ActionTypeHint):
            action._enable_path = False
            action.sub_add_kwargs = {**getattr(action, "sub_add_kwargs", {}), "sub_configs": False}
    for module in (_actions, _typehints):
        module.parse_value_or_config = _as_it_stands  # type: ignore[attr-defined]


def _as_it_stands(value: Any, enable_path: bool = True, simple_types: bool = False) -> Any:
    text = value.val if isinstance(value, _util.NestedArg) else value
    if isinstance(text, str):
        with suppress(yaml.YAMLError):  # then it is a text
            _count(text)
        if enable_path and text.endswith((".yaml", ".yml", ".json")):
            raise UsageError(f"{text}: an option's value is not read from a file; write it out, or use --config")
    return _util.parse_value_or_config(value, enable_path=False, simple_types=simple_types)


def _plain(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())[:300]


def _refused(path: str | Path, reason: str) -> UsageError:
    return UsageError(f"config = {path}: {reason}")


def _count(text: str) -> None:
    """Follow the file's events, which are as many as its words, and count the values that they stand for."""
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # name of each collection around, and the count before it
    keys = _Keys()
    total = 0
    for event in yaml.parse(text, Loader=_Loader):
        keys.see(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError("a collection holds itself")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            tagged = not any(event.implicit) and event.tag != "tag:yaml.org,2002:str"
            if len(event.value) > _LONGEST_NUMBER and (
                tagged or (not event.style and event.value[0] in "+-.0123456789")
            ):
                raise ValueError(f"has a number of {len(event.value):,} characters")
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, total))
            total += 1
            if event.anchor:
                sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_.pop()
            if name:
                sizes[name] = total - before
        if total > _MOST_VALUES or len(open_) > _DEEPEST:
            raise ValueError(f"would be more than {_MOST_VALUES:,} values, or more than {_DEEPEST} deep")


class _Keys:
    """Finds what a mapping has twice, of which the reader would take the last without a word.

    That is a key, or what a mapping holds for one: the parser reads ``a.b: 1`` as ``a: {b: 1}``.
    """

    def __init__(self) -> None:
        self._open: list[_Names | None] = []  # of each collection around

    def see(self, event: yaml.Event) -> None:
        """Take the next event of the file.

        Raises:
            ValueError: a mapping has something twice; says what, and where.
        """
        if isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            return
        if not isinstance(event, yaml.NodeEvent):
            return
        if self._open and (names := self._open[-1]):
            names.see(event)
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append(_Names() if isinstance(event, yaml.MappingStartEvent) else None)


class _Names:
    """The keys of a mapping."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._above: set[str] = set()  # a and a.b of the key a.b.c
        self._mappings: set[str] = set()
        self._key: str | None = None  # whose value comes next
        self._value_next = False

    def see(self, event: yaml.NodeEvent) -> None:
        """Take a key or a value."""
        if not self._value_next:
            self._key = event.value if isinstance(event, yaml.ScalarEvent) else None
        if self._key is not None:
            self._see_value(self._key, event) if self._value_next else self._see_key(self._key, event)
        self._value_next = not self._value_next

    def _see_key(self, key: str, event: yaml.NodeEvent) -> None:
        if key in self._known:
            raise self._twice(key, event)
        parts = key.split(".", _DEEPEST)
        above = [".".join(parts[:count]) for count in range(1, len(parts))]
        for name in self._mappings.intersection(above):
            raise self._twice(name, event)
        self._known.add(key)
        self._above.update(above)

    def _see_value(self, key: str, event: yaml.NodeEvent) -> None:
        if key in self._above:  # what came in its parts is forgotten
            raise self._twice(key, event)
        if isinstance(event, yaml.MappingStartEvent | yaml.AliasEvent):
            self._mappings.add(key)

    @staticmethod
    def _twice(key: str, event: yaml.NodeEvent) -> ValueError:
        line = event.start_mark.line + 1
        return ValueError(f"the key {key[:60]!r} comes twice in a mapping, again in line {line}")
