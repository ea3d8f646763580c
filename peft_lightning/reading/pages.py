"""Headers of the pages of a Parquet column, of which only the lengths are wanted: they decide what memory is taken.

They are structs in Thrift's compact protocol; field 2 is the length of the page unpacked, field 3 that in the file, and
field 1 of a struct within, which differs by the kind of page, the number of its values: a few bytes may stand for many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["unpacked_bytes"]

_UNPACKED, _PACKED = 2, 3
_KINDS, _VALUES = (5, 7, 8), 1  # data, dictionary, data of version 2
_VALUE = 8  # bytes in memory, at most times
_WHOLE_NUMBERS = (4, 5, 6)
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_FIXED = {_TRUE: 0, _FALSE: 0, _BYTE: 1, _DOUBLE: 8}
_DEEPEST = 8


def unpacked_bytes(view: memoryview, start: int, end: int) -> int:
    """Bytes that the pages of a column chunk promise to be in memory.

    Args:
        view: of the file.
        start: place of the chunk's first page.
        end: place behind its last one.

    Raises:
        ValueError: a header is damaged, or a page leads out of the file.
    """
    total, reader = 0, _Reader(view, start)
    while reader.place < end:
        header = reader.struct()
        unpacked, packed = (_number(header.get(field)) for field in (_UNPACKED, _PACKED))
        inside = [part for kind in _KINDS if isinstance(part := header.get(kind), dict)]
        values = max((_number(part.get(_VALUES, 0)) for part in inside), default=0)
        total += max(unpacked, _VALUE * values)
        reader.skip(packed)
    return total


def _number(found: Any) -> int:
    if not isinstance(found, int) or found < 0:
        raise ValueError("is damaged (a page without a length)")
    return found


class _Reader:
    """Goes through Thrift's compact protocol, and makes nothing but whole numbers of it."""

    def __init__(self, view: memoryview, place: int) -> None:
        self.view, self.place = view, place

    def skip(self, count: int) -> None:
        """Pass over bytes, which must be there."""
        if not 0 <= count <= len(self.view) - self.place:
            raise ValueError("is damaged (a page that leads out of the file)")
        self.place += count

    def byte(self) -> int:
        self.skip(1)
        return self.view[self.place - 1]

    def number(self) -> int:
        """A whole number, seven bits a byte, as it is written."""
        found = shift = 0
        while True:
            byte = self.byte()
            found |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return found
            if shift > 63:
                raise ValueError("is damaged (a number of too many bytes)")

    def signed(self) -> int:
        """A whole number whose lowest bit is its sign."""
        found = self.number()
        return found >> 1 ^ -(found & 1)

    def struct(self, depth: int = 0) -> Mapping[int, Any]:
        """The whole numbers and structs among a struct's fields, by field."""
        if depth > _DEEPEST:
            raise ValueError("is damaged (a page's header is nested too deeply)")
        found: dict[int, Any] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.signed()
            kind = head & 0x0F
            if kind in _WHOLE_NUMBERS:
                found[field] = self.signed()
            elif kind == _STRUCT:
                found[field] = self.struct(depth + 1)
            else:
                self.pass_over(kind, depth)
        return found

    def pass_over(self, kind: int, depth: int) -> None:
        """Pass over a value."""
        if kind in _FIXED:
            self.skip(_FIXED[kind])
        elif kind == _BINARY:
            self.skip(self.number())
        elif kind == _STRUCT:
            self.struct(depth + 1)
        elif kind in (_LIST, _SET):
            self.elements(depth + 1)
        else:
            raise ValueError("is damaged (a page's header has a field of no known type)")

    def elements(self, depth: int) -> None:
        """Pass over a list; its elements have at least a byte each."""
        head = self.byte()
        count, kind = head >> 4, head & 0x0F
        count = self.number() if count == 15 else count
        if depth > _DEEPEST or count > len(self.view) - self.place:
            raise ValueError("is damaged (a page's header with a list that leads out of the file)")
        for _ in range(count):
            if kind in _WHOLE_NUMBERS:
                self.number()
            elif kind in (_TRUE, _FALSE):
                self.skip(1)  # in a list a truth is a byte
            else:
                self.pass_over(kind, depth)
