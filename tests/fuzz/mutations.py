"""Ways in which a file may be broken; each is drawn from a seed."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

VALUES: list[Any] = [None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "", "../../x", "\x00", [], {}]
VALUES += ["9" * 5000, [[[[]]]], {"a": {"b": 1}}, 10**9, "trust_remote_code", -(2**63), "\ud800"]


def flip_a_bit(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def flip_a_bit_at_the_start(data: bytes, rng: random.Random) -> bytes:
    return flip_a_bit(data[:200], rng) + data[200:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice([b"\x00", b"\n\n{}", b"garbage", data])


def zeros(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data)), rng.choice([4, 64, 4096])
    part = data[place : place + length]
    return data[:place] + bytes(len(part)) + data[place + len(part) :]


def leave_out(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice([1, 8, 100]) :]


def twice(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    part = data[place : place + rng.choice([1, 8, 100])]
    return data[:place] + part + data[place:]


def a_huge_number(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"(?<![\w.])-?\d+(\.\d+)?", data))
    if not found:
        return flip_a_bit(data, rng)
    place = rng.choice(found)
    number = rng.choice([b"9" * 5000, b"1e400", b"-1", b"NaN", b"18446744073709551616", b"1" + b"0" * 12, b"Infinity"])
    return data[: place.start()] + number + data[place.end() :]


def huge_bytes(data: bytes, rng: random.Random) -> bytes:
    """Lengths stand in four or eight bytes."""
    place, number = (
        rng.randrange(max(1, len(data) - 8)),
        rng.choice([b"\xff" * 4, b"\xff" * 7 + b"\x7f", b"\x7f" + b"\xff" * 3]),
    )
    return data[:place] + number + data[place + len(number) :]


def another_encoding(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("latin-1")
    return rng.choice(
        [
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + data,
            text.encode("utf-32"),
            data.replace(b"\n", b"\r\n"),
            data + b"\xff",
        ]
    )


def nested(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"a: " + b"[" * 50_000, b"a: &a [*a, *a]\n" + data])


BYTES: list[Callable[[bytes, random.Random], bytes]] = [flip_a_bit, flip_a_bit_at_the_start, truncate, empty, append]
BYTES += [zeros, leave_out, twice, a_huge_number, huge_bytes, another_encoding, nested]


# -- values by their keys


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Each mapping or list inside with each of its keys."""
    found: list[tuple[Any, Any]] = []
    keys: Any = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys)[:200]:
        found.append((content, key))
        found += _places(content[key])
    return found


def change_a_value(content: Any, rng: random.Random) -> Any:
    """Another value, a missing or renamed key, or two values in each other's place."""
    places = _places(content)
    if not places:
        return rng.choice(VALUES)
    inside, key = rng.choice(places)
    what = rng.randrange(5)
    if what == 0:
        del inside[key]
    elif what == 1 and isinstance(inside, dict):
        inside[f"{key}x"] = inside.pop(key)
    elif what == 2:
        other, second = rng.choice(places)
        try:
            inside[key], other[second] = other[second], inside[key]
            json.dumps(content)
        except (KeyError, IndexError, ValueError):  # one was inside the other
            return None
    else:
        inside[key] = rng.choice(VALUES)
    return content


def change_json(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps(change_a_value(json.loads(data), rng))
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # each key twice
    return text.encode()


def change_yaml(data: bytes, rng: random.Random) -> bytes:
    changed = change_a_value(yaml.safe_load(data), rng)
    return str(yaml.dump(changed)).encode("utf-8", "surrogatepass")


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Of a file of safetensors: names, shapes, dtypes, places; or its length, or numbers that are none."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return (
            data[:8]
            + data[8 : 8 + length]
            + data[8 + length : -4]
            + rng.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"])
        )
    if rng.random() < 0.2:
        return rng.choice([2**62, 2**40, length + 1, 0, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    header = change_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


STRUCTURED = {".json": change_json, ".yaml": change_yaml, ".safetensors": change_header}


def mutate(folder: Path, names: list[str], rng: random.Random, *, keep: bool) -> str:
    """Break one of the files (names, in a folder), and say how; with ``keep`` it is there in some form."""
    path = folder / rng.choice(names)
    what = rng.random()
    if what < 0.1:
        path.unlink()
        kinds = ["is a folder", "is a pipe", "leads to /dev/zero", "leads nowhere", "is missing"]
        kind = rng.choice(kinds[:3] if keep else kinds)
        if kind == "is a folder":
            path.mkdir()
        elif kind == "is a pipe":
            os.mkfifo(path)
        elif kind.startswith("leads"):
            path.symlink_to("/dev/zero" if "zero" in kind else path.name)
        return f"{path.name} {kind}"
    data = path.read_bytes()
    structured = STRUCTURED.get(path.suffix)
    change = rng.choice(BYTES) if structured is None or what < 0.55 else structured
    try:
        path.write_bytes(change(data, rng) if data else b"x")
    except (ValueError, yaml.YAMLError):  # the file is named like others whose values can be changed
        change = truncate
        path.write_bytes(truncate(data, rng))
    return f"{path.name} {change.__name__}"
