"""The documents of an unlabelled corpus: files, folders, a hub data set, or what ships with every Python.

In a text file an empty line ends a document. In Parquet and JSON Lines the column ``text`` holds it, and rows
that follow each other with the same ``doc_id`` are one document. A folder gives its files ``train.*``,
``validation.*`` and ``test.*`` to these splits where it has any of them, and else all its files to training.

Nothing is read whole: a document comes in pieces, cut where a line or a word ends. So a file may be larger than the
memory, even if it is one document or one line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
# Part of the key of the hash that holds out.
_HELD_OUT = 3
_AT_ONCE = 1024


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
    """

    name: str
    digest: str
    read: Callable[[], Iterator[Piece]]


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
    entries = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    if not entries:
        raise UsageError(f"{option} is empty; allowed: files, folders or hub names, or null")
    try:
        parts = [part for entry in entries for part in _parts(os.fspath(entry), split, unmarked, option)]
    except OSError as error:
        raise DataError(f"{option} cannot be read: {error}") from error
    if not parts:
        return None
    digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()
    return Corpus(name=", ".join(part.name for part in parts), digest=digest, read=lambda: _numbered(parts))


def held_out_part(corpus: Corpus, share: float, *, inside: bool) -> Corpus:
    """Return the held-out ``share`` of the documents, or what remains.

    A hash of a document's number decides, so that it does not change when documents are added at the end. A very
    long document counts as several.
    """

    def read() -> Iterator[Piece]:
        unit, number, document, length, held, decided = -1, -1, -1, 0, False, np.empty(0, bool)
        for piece in corpus.read():
            if piece.document != document or length >= _LONG:
                unit += 1
                # What comes after a gap does not go on with what came before it.
                if piece.document != document or held != inside:
                    number = unit
                document, length = piece.document, 0
                if unit % _AT_ONCE == 0:
                    decided = uniform(np.arange(unit, unit + _AT_ONCE), 1, (_HELD_OUT,))[:, 0] < share
                held = decided[unit % _AT_ONCE]
            length += len(piece.text)
            if held == inside:
                yield Piece(number, piece.text)

    which = f"held_out = {share}" if inside else f"without held_out = {share}"
    return replace(corpus, name=f"{corpus.name} ({which})", digest=f"{corpus.digest} {which}", read=read)


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
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS and path.is_file())
    if not files:
        raise DataError(f"{folder}: has no file of a known kind; allowed: {', '.join(READERS)}")
    if any(path.stem in _SPLITS for path in files):
        return [path for path in files if path.stem == split]
    return files if split == unmarked else []


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


def _pieces(texts: Iterable[tuple[int, str]]) -> Iterator[Piece]:
    """Cut texts, each with the number of its document, into pieces."""
    for document, text in texts:
        start = 0
        while len(text) - start > _PIECE:
            end = _last_break(text, start)
            yield Piece(document, text[start:end])
            start = end
        if rest := text[start:]:
            yield Piece(document, rest)


def _last_break(text: str, start: int) -> int:
    """Return where the piece from ``start`` ends: before its last line end or space, else wherever it is full.

    The space goes with the word after it, as in byte-level vocabularies.
    """
    stop = start + _PIECE
    breaks = (text.rfind(mark, start + 1, stop) for mark in ("\n", " "))
    return next((end for end in breaks if end > 0), stop)
