"""The documents of an unlabelled corpus: files, folders, a hub data set, or what ships with every Python.

In a text file an empty line ends a document. In Parquet and JSON Lines the column ``text`` holds it, and rows
that follow each other with the same ``doc_id`` are one document.

A folder is read with the folders in it, in the order of the paths; names that begin with a dot are left out, and links
to folders are not followed. It gives its files ``train.*``, ``validation.*`` and ``test.*``, and what is in its folders
``train``, ``validation`` and ``test``, to these splits where it has any of them, and else all to training. Further down
these names mean nothing.

Nothing is read whole: a document comes in pieces, cut where a line or a word ends. So a file may be larger than the
memory, even if it is one document or one line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_lightning.data.offline import offline_digest, offline_documents
from peft_lightning.data.readers import READERS, hub_splits, read_hub
from peft_lightning.errors import DataError, UsageError
from peft_lightning.functional.corruption import uniform

__all__ = ["Corpus", "Piece", "held_out_part", "open_corpus"]

_SPLITS = ("train", "validation", "test")
# Characters of a piece at most: enough for a tokenizer to be fast, few enough to hold a thousand of them.
_PIECE = 1 << 15
# A document counts anew for holding out after so many characters, or else a corpus of one book had nothing to hold out.
_LONG = 1 << 16
# And after so many, or fewer, in a corpus of which otherwise nothing would be held out, or all.
_SHORT, _SHORTEST = 1 << 12, 1 << 8
# Files that messages name.
_NAMED = 4
# Changes with the documents that are held out.
_FORMAT = 2
# Part of the key of the hash that holds out.
_HELD_OUT = 3
_AT_ONCE = 1024
_OTHER = "inputs for validation, or limit_val_batches 0"


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        document: its number; it grows, and pieces of a document follow each other.
        text: never empty, but perhaps only spaces.
    """

    document: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that can be read again and again.

    Attributes:
        name: what messages call it.
        digest: changes when the documents do.
        read: yields their pieces in order.
        advice: what messages add that say that there is too little.
    """

    name: str
    digest: str
    read: Callable[[], Iterator[Piece]]
    advice: str = ""


def open_corpus(inputs: str | Sequence[str] | None, split: str, *, unmarked: str = "train") -> Corpus | None:
    """Return the documents of a split.

    Args:
        inputs: files, folders or hub names (``name:configuration`` where one is needed), one or several; None: texts
            of Python's own.
        split: train, validation or test.
        unmarked: the split to which files belong whose folder does not name splits, and those given one by one.

    Returns:
        The corpus, or None where ``inputs`` has nothing for ``split``.

    Raises:
        UsageError: an input does not exist, or is of no known kind.
        DataError: an input cannot be read, or a folder holds nothing of a known kind.
    """
    if inputs is None:
        return _offline() if split == unmarked else None
    option = "inputs" if unmarked == "train" else unmarked
    entries = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str | os.PathLike) for entry in entries):
        raise UsageError(f"{option} is {inputs!r}; allowed: files, folders or hub names, or null")
    if not entries:
        raise UsageError(f"{option} is empty; allowed: files, folders or hub names, or null")
    try:
        parts = [part for entry in entries for part in _parts(os.fspath(entry), split, unmarked, option)]
    except OSError as error:
        raise DataError(f"{option} cannot be read: {error}") from error
    if not parts:
        return None
    digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()
    names = [part.name for part in parts]
    if len(names) > _NAMED:
        names[_NAMED - 1 :] = [f"{len(names) - _NAMED + 1} more"]
    return Corpus(name=", ".join(names), digest=digest, read=lambda: _numbered(parts))


def held_out_part(corpus: Corpus, share: float, *, inside: bool) -> Corpus:
    """Return the held-out ``share`` of the documents, or what remains.

    A hash of a document's number decides, so that it does not change when documents are added at the end. A very
    long document counts as several. Where this puts all of a small corpus on one side, shorter parts count, and
    those with the smallest hashes are held out: at least one, and not all.

    Reading what is held out raises DataError where there are no two parts.
    """
    few = cache(lambda: _held_of_few(corpus, share))
    which = f"held_out = {share}" if inside else f"without held_out = {share}"
    name = f"{corpus.name} ({which})"

    def read() -> Iterator[Piece]:
        size, chosen = few()
        last, number, document, held = -1, -1, -1, False
        for unit, piece in _units(corpus, size):
            if unit != last:
                before, held = held, _hash(unit) < share if chosen is None else unit in chosen
                # What comes after a gap does not go on with what came before it.
                if piece.document != document or before != inside:
                    number = unit
                last, document = unit, piece.document
            if held == inside:
                yield Piece(number, piece.text)
        if inside and last == 0:
            raise DataError(f"{name}: is one short document, of which nothing can be held out; allowed: {_OTHER}")

    advice = f"; or a larger held_out; or {_OTHER}" if inside else ""
    return replace(corpus, name=name, digest=f"{corpus.digest} {which}, {_FORMAT}", read=read, advice=advice)


def _held_of_few(corpus: Corpus, share: float) -> tuple[int, frozenset[int] | None]:
    """Return after how much of a document another unit begins, and the units to hold out where no hash decides."""
    sides, total = set(), 0
    for unit, piece in _units(corpus, _LONG):
        sides.add(_hash(unit) < share)
        total += len(piece.text)
        # After a few units where there are many.
        if len(sides) == 2:
            return _LONG, None
    size = min(_SHORT, max(_SHORTEST, total // 4))
    lengths: list[int] = []
    for unit, piece in _units(corpus, size):
        lengths += [0] * (unit + 1 - len(lengths))
        lengths[unit] += len(piece.text)
    # The rest of a document is too little to validate on.
    order = sorted(range(len(lengths)), key=lambda unit: (2 * lengths[unit] < size, _hash(unit)))
    held = min(len(lengths) - 1, max(1, round(share * len(lengths))))
    return size, frozenset(order[: max(0, held)])


def _units(corpus: Corpus, size: int) -> Iterator[tuple[int, Piece]]:
    """Yield pieces, each with the number of what is held out as a whole: a document, or ``size`` of its characters."""
    unit, document, length = -1, -1, 0
    for piece in corpus.read() if size == _LONG else _pieces(corpus.read(), size // 4):
        if piece.document != document or length >= size:
            unit, document, length = unit + 1, piece.document, 0
        length += len(piece.text)
        yield unit, piece


def _hash(unit: int) -> float:
    return float(_hashes(unit // _AT_ONCE)[unit % _AT_ONCE])


@lru_cache(maxsize=2)
def _hashes(part: int) -> np.ndarray:
    return uniform(np.arange(part * _AT_ONCE, (part + 1) * _AT_ONCE), 1, (_HELD_OUT,))[:, 0]


def _numbered(parts: Sequence[Corpus]) -> Iterator[Piece]:
    """The pieces of several corpora, their documents numbered through."""
    number = -1
    for part in parts:
        document = -1
        for piece in part.read():
            if piece.document != document:
                number, document = number + 1, piece.document
            yield Piece(number, piece.text)


def _offline() -> Corpus:
    return Corpus(
        name="the texts of Python",
        digest=offline_digest(),
        read=lambda: _pieces(enumerate(offline_documents())),
    )


def _parts(entry: str, split: str, unmarked: str, option: str) -> list[Corpus]:
    path = Path(entry).expanduser()
    if entry and path.is_dir():
        return [_file(file, option) for file in _of_split(path, split, unmarked)]
    if entry and path.exists():
        return [_file(path, option)] if split == unmarked else []
    if entry.startswith(("/", ".", "~")) or path.suffix.lower() in READERS or not entry:
        raise UsageError(f"{option} is {entry!r}; allowed: a file or folder that exists, or a hub name")
    return _hub(entry, split)


def _of_split(folder: Path, split: str, unmarked: str) -> list[Path]:
    files = sorted(path for path in _below(folder) if path.suffix.lower() in READERS and path.is_file())
    if not files:
        raise DataError(f"{folder}: has no file of a known kind; allowed: {', '.join(READERS)}")
    # The file itself, or the folder in this one.
    names = [path.stem if path.parent == folder else path.relative_to(folder).parts[0] for path in files]
    if any(name in _SPLITS for name in names):
        return [path for path, name in zip(files, names, strict=True) if name == split]
    return files if split == unmarked else []


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files but hidden ones.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _file(path: Path, option: str) -> Corpus:
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UsageError(f"{option} is {str(path)!r}; allowed: a file of kind {', '.join(READERS)}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Corpus(name=str(path), digest=f"{kind} {digest}", read=lambda: _pieces(READERS[kind](path)))


def _hub(name: str, split: str) -> list[Corpus]:
    splits = hub_splits(name)
    if split not in splits:
        return []
    data, where = splits[split], f"hub data set {name}, split {split}"
    digest = f"{name} {split} {data._fingerprint}"
    return [Corpus(name=where, digest=digest, read=lambda: _pieces(read_hub(data, where)))]


def _pieces(texts: Iterable[tuple[int, str]], most: int | None = None) -> Iterator[Piece]:
    """Cut texts, each with the number of its document, into pieces."""
    size = most or _PIECE
    for document, text in texts:
        start = 0
        while len(text) - start > size:
            end = _last_break(text, start, start + size)
            yield Piece(document, text[start:end])
            start = end
        if rest := text[start:]:
            yield Piece(document, rest)


def _last_break(text: str, start: int, stop: int) -> int:
    """Return where the piece from ``start`` ends: before its last line end or space, else wherever it is full.

    The space goes with the word after it, as in byte-level vocabularies.
    """
    breaks = (text.rfind(mark, start + 1, stop) for mark in ("\n", " "))
    return next((end for end in breaks if end > 0), stop)
