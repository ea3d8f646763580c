"""A pickle's opcodes, followed with stand-ins for its values: what it calls, and how much it would be.

Nothing is imported, called or allocated on its behalf.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Box", "Machine"]

_MOST_VALUES, _DEEPEST = 4_000_000, 100
_LARGEST, _MOST_BITS = 1 << 62, 1024  # of an extent; of any whole number
_STORAGE = re.compile(r"torch (\w+)Storage")
_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
_SIZES |= {"Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16, "Untyped": 1}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_MAPPING, _SIZE, _DEVICE = "collections OrderedDict", "torch Size", "torch device"
_CALLED = (_TENSOR, _PARAMETER, _MAPPING, _SIZE, _DEVICE)
_DTYPES = {f"torch {str(value).removeprefix('torch.')}" for value in vars(torch).values() if type(value) is torch.dtype}


@dataclass(eq=False)
class Box:
    """A container of a pickle: how many values it would be, written out. One that is inside another is finished."""

    parts: list[Any]
    size: int = 1
    finished: bool = False
    depth: int = 1

    def take(self, parts: list[Any]) -> None:
        """Put values inside, which are finished by that: so nothing can hold itself."""
        for part in parts:
            if part is self:
                raise ValueError("is a pickle with a container that holds itself")
            if isinstance(part, Box):
                part.finished = True
                self.depth = max(self.depth, part.depth + 1)
            self.size += part.size if isinstance(part, Box) else 1
        self.parts += parts
        _bound(self.size)
        if self.depth > _DEEPEST:
            raise ValueError(f"is a pickle of containers more than {_DEEPEST} deep")


@dataclass(frozen=True, eq=False)
class _Name:
    name: str


@dataclass(frozen=True, eq=False)
class _Storage:
    numbers: int


_OPAQUE = object()  # a tensor, a dtype, an empty OrderedDict: a value that is done


class Machine:
    """Follows the opcodes of a pickle with stand-ins for the values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks: list[int] = []
        self.storages: dict[str, int] = {}
        self.result: Any = None

    def run(self, stream: Any) -> Machine:
        """Follow one pickle to its end; ``result`` is what it stands for."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            _bound(number)
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"is a pickle with {opcode.name}, which no tensors and plain containers need")
            step(self, argument)
        self.result = self.stack.pop()
        return self

    def name(self, name: str) -> None:
        """A name may be called, be the kind of a storage, or be a dtype."""
        if name not in _CALLED and name not in _DTYPES and not _STORAGE.fullmatch(name):
            raise ValueError(f"names {name.replace(' ', '.')[:100]}; allowed: tensors and plain containers")
        self.stack.append(_Name(name))

    def since_mark(self) -> list[Any]:
        """What was put down since the last mark."""
        if not self.marks:
            raise ValueError("is damaged (a pickle without a mark)")
        place = self.marks.pop()
        found = self.stack[place:]
        del self.stack[place:]
        return found

    def box(self, parts: list[Any]) -> None:
        """A new container."""
        self.stack.append(Box([]))
        self.fill(parts)

    def fill(self, parts: list[Any]) -> None:
        """Add values to the container on the top; none that is inside another grows, so that none holds itself."""
        box = self.stack[-1]
        if not isinstance(box, Box) or box.finished:
            raise ValueError("is a pickle with a container that changes after its use")
        for part in parts:
            if isinstance(part, _Name) and part.name not in _DTYPES or isinstance(part, _Storage):
                raise ValueError("is a pickle with a bare function or storage among its values")
        box.take(parts)

    def tuple(self, count: int | None) -> None:
        """A tuple of the last values; it may hold what is to be called with."""
        parts = self.since_mark() if count is None else self.stack[-count:]
        if count is not None:
            del self.stack[-count:]
        box = Box([])
        box.take(parts)
        box.finished = True
        self.stack.append(box)

    def storage(self, _: Any) -> None:
        """A storage: its kind, its key, its place and its length."""
        word, kind, key, _place, count, *view = self.stack.pop().parts
        found = _STORAGE.fullmatch(kind.name)
        if (
            word != "storage"
            or view not in ([], [None])
            or found is None
            or found[1] not in _SIZES
            or type(count) is not int
            or count < 0
        ):
            raise ValueError("is damaged (a storage without kind or length)")
        length = count * _SIZES[found[1]]
        if self.storages.setdefault(str(key), length) != length:
            raise ValueError(f"the storage {str(key)[:40]!r} has two lengths")
        self.stack.append(_Storage(count))

    def call(self, _: Any) -> None:
        """One of the few functions that there may be."""
        arguments, function = self.stack.pop().parts, self.stack.pop().name
        if function == _TENSOR:
            _check_tensor(*arguments[:4])
            self.stack.append(_OPAQUE)
        elif function == _PARAMETER and arguments[0] is _OPAQUE:
            self.stack.append(_OPAQUE)
        elif function == _MAPPING and not arguments:
            self.stack.append(Box([]))
        elif function == _SIZE and isinstance(arguments[0], Box):
            self.stack.append(arguments[0])
        elif function == _DEVICE:
            self.stack.append(_OPAQUE)
        else:
            raise ValueError(f"calls {function.replace(' ', '.')} in a way that torch does not write")

    def build(self, _: Any) -> None:
        """Attributes of an OrderedDict, as a state_dict has them."""
        state = self.stack.pop()
        self.fill([state])


def _check_tensor(storage: _Storage, offset: int, shape: Box, stride: Box) -> None:
    """It lies within its storage, and no number of it stands for several."""
    extents, steps = shape.parts, stride.parts
    if len(extents) != len(steps) or len(extents) > 64 or type(offset) is not int or offset < 0:
        raise ValueError("has a tensor of damaged shape")
    if not all(type(value) is int and 0 <= value < _LARGEST for value in [*extents, *steps, offset]):
        raise ValueError("has a tensor of damaged shape")
    count, last = 1, offset
    for extent, step in zip(extents, steps, strict=True):
        count, last = count * extent, last + (extent - 1) * step
    if count > storage.numbers or (count and last >= storage.numbers):
        raise ValueError(
            f"has a tensor of shape {str(tuple(extents))[:100]} in a storage of {storage.numbers:,} numbers"
        )


def _bound(count: int) -> None:
    if count > _MOST_VALUES:
        raise ValueError("is a pickle of too many values, or of containers in containers that would be")


def _push(value: Any) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value)


def _given(machine: Machine, argument: Any) -> None:
    if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
        raise ValueError(f"is a pickle with a number of {argument.bit_length():,} bits")
    machine.stack.append(argument)


def _remember(machine: Machine, place: int | None) -> None:
    machine.memo[len(machine.memo) if place is None else place] = machine.stack[-1]


_STEPS: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _given),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"), _given),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: machine.stack.append(machine.memo[place])),
    **dict.fromkeys(("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"), lambda machine, _: machine.box([])),
    **dict.fromkeys(("APPENDS", "SETITEMS", "ADDITEMS"), lambda machine, _: machine.fill(machine.since_mark())),
    "APPEND": lambda machine, _: machine.fill([machine.stack.pop()]),
    "SETITEM": lambda machine, _: machine.fill([machine.stack.pop(-2), machine.stack.pop()]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(Box([], 1, True)),
    "TUPLE": lambda machine, _: machine.tuple(None),
    "TUPLE1": lambda machine, _: machine.tuple(1),
    "TUPLE2": lambda machine, _: machine.tuple(2),
    "TUPLE3": lambda machine, _: machine.tuple(3),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "NONE": _push(None),
    "NEWTRUE": _push(True),
    "NEWFALSE": _push(False),
    "GLOBAL": lambda machine, name: machine.name(name),
    "BINPERSID": lambda machine, argument: machine.storage(argument),
    "REDUCE": lambda machine, argument: machine.call(argument),
    "BUILD": lambda machine, argument: machine.build(argument),
}
