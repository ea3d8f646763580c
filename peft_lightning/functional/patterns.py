"""Regular expressions from files and options, refused where matching them could take for ever.

Python's matcher tries all ways in which an expression can match, and there is no time limit that works everywhere.
So the ways are counted before: in a text of 64 characters, as long as the paths of modules are, k parts that repeat
without bound can share the text in C(64 + k, k) ways, and what is chosen or repeated inside multiplies them. Up to
four of ``.*`` are allowed (``.*layer.*attention.*query.*``), and ``(.+)+`` is not. The count is an upper bound, so a
few expressions are refused that would do no harm.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from math import comb

from peft_lightning.errors import UsageError

__all__ = ["LONGEST_PATH", "compile_pattern"]

LONGEST_PATH = 100
"""Characters at most in a path from a file that such an expression is matched with."""

_LENGTH = 64
_MOST_WAYS = 1_000_000
_LONGEST = 100_000
_DEEPEST = 30
_OPENING = re.compile(r"\((?:\?(?::|=|!|<=|<!|P<\w+>))?(?!\?)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"(?:([*+?])|\{(\d*)(?:(,)(\d*))?\})[?+]?")


@dataclass(frozen=True)
class _Ways:
    """``choices`` ways, times those in which ``open`` parts without bound share the text."""

    choices: int = 1
    open: int = 0

    def then(self, other: _Ways) -> _Ways:
        return _Ways(min(self.choices * other.choices, _MOST_WAYS + 1), min(self.open + other.open, _LENGTH))

    def either(self, other: _Ways) -> _Ways:
        return _Ways(self.choices + other.choices, max(self.open, other.open))

    def repeated(self, least: int, most: int | None, group: bool) -> _Ways:
        if self == _Ways() and not group:
            return _Ways(1, 1) if most is None else _Ways(min(most - least, _MOST_WAYS) + 1)
        times = max(least, _LENGTH if most is None else min(most, _LENGTH))
        if times > 1 and (self != _Ways() or least > 1):
            # each time may go another way, and a group is entered as often as it must be, even where it is empty
            whole = _Ways(min(self.choices ** min(times, _LENGTH), _MOST_WAYS + 1), min(self.open * times, _LENGTH))
            return whole.then(_Ways(min(times, _MOST_WAYS) + 1))
        return self.then(_Ways(times + 1 - least)) if most is not None else _Ways(1, 1)

    @property
    def count(self) -> int:
        return self.choices * comb(_LENGTH + self.open, self.open)


def compile_pattern(text: str, what: str, *, whole: bool = False) -> re.Pattern[str]:
    """Compile a regular expression over paths of modules.

    Args:
        text: the expression.
        what: the option or key it comes from, for messages.
        whole: whether it is matched from the path's beginning only; else it may be found anywhere.

    Raises:
        UsageError: if it is no regular expression, or may take too long to match.
    """
    if not isinstance(text, str):
        raise UsageError(f"{what} = {str(text)[:200]}: must be a regular expression")
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    if len(text) > _LONGEST:
        raise UsageError(f"{what} = {shown!r}: must have {_LONGEST} characters at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets in sets, which a later Python may read otherwise
            pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise UsageError(f"{what} = {shown!r}: not a regular expression ({error})") from None
    reader = _Reader(text)
    try:
        ways, branches = reader.branches(0)
    except ValueError as error:
        raise UsageError(f"{what} = {shown!r}: {error}") from None
    if not whole and not (branches == 1 and text.startswith(("^", ".*"))):
        ways = ways.then(_Ways(1, 1))  # it may begin anywhere
    if ways.count > _MOST_WAYS:
        raise UsageError(
            f"{what} = {shown!r}: may take too long to match; repeat no group that repeats or chooses inside, and use "
            "* and + three times at most"
        )
    return pattern


class _Reader:
    """Reads an expression that is known to be well formed."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def branches(self, depth: int) -> tuple[_Ways, int]:
        """Up to the end of a group: its ways and the number of its branches."""
        if depth > _DEEPEST:
            raise ValueError(f"must have {_DEEPEST} groups inside each other at most")
        total, number = self._sequence(depth), 1
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            total, number = total.either(self._sequence(depth)), number + 1
        return total, number

    def _sequence(self, depth: int) -> _Ways:
        ways = _Ways()
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            group = self.text[self.at] == "("
            item = self._item(depth)
            while found := self._repeat():
                item, group = item.repeated(*found, group), True
            ways = ways.then(item)
        return ways

    def _item(self, depth: int) -> _Ways:
        kind = self.text[self.at]
        if kind == "(":
            found = _OPENING.match(self.text, self.at)
            if found is None:
                raise ValueError(f"groups of the kind {self.text[self.at : self.at + 4]!r} are not read here")
            self.at = found.end()
            ways, _ = self.branches(depth + 1)
            self.at += 1
            return ways
        if kind == "[":
            found = _CLASS.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
        else:
            self.at += 2 if kind == "\\" else 1
        return _Ways()

    def _repeat(self) -> tuple[int, int | None] | None:
        """The bounds of a repetition that stands here, else None."""
        found = _REPEAT.match(self.text, self.at)
        if found is None or found[0].startswith("{}"):  # the latter are two characters like others
            return None
        self.at = found.end()
        if found[1]:
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[1]]
        least = int(found[2] or 0)
        if found[3] is None:
            return least, least
        return least, int(found[4]) if found[4] else None
