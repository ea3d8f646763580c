"""A corpus as blocks of exactly S tokens, packed once into a file that all processes map into memory.

The documents make one stream of tokens, ``document [SEP] document [SEP] ...``. A block is [CLS] and the next S - 1
tokens of it; what does not fill a block at the end is left out. There is no padding.

The file is Arrow IPC: record batches of two columns, the block's S numbers, as small as the vocabulary allows, and how
many of them are words: a reader that needs a certain number of words leaves out the blocks that have fewer. Its name is
a digest of everything that changes the result, so no file is ever out of date. It is built by one process under a lock,
and appears whole (``atomic.py``). Each record batch carries a checksum; a damaged file is built again. Neither building
nor reading needs memory for more than a few record batches.

Shapes: B blocks of a batch, N of a record batch, S tokens of a block, T of a part of the stream.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from peft_lightning.data.cache import cache_key, schema_text
from peft_lightning.data.documents import Corpus, Piece
from peft_lightning.data.lock import build_once
from peft_lightning.data.vocabulary import Vocabulary
from peft_lightning.errors import DataError
from peft_lightning.reading.limits import regular_size

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Blocks", "packed"]

_FORMAT = 2
# Blocks of a record batch, but for the last one.
_ROWS = 1024
# Characters that are tokenised together: enough for all cores, few enough to hold what a tokenizer says of each token.
_TOGETHER = 1 << 20
_log = logging.getLogger(__name__)


class Blocks:
    """The blocks of a file; they are read from the disk when they are asked for.

    Args:
        path: of the file.
        key: that it must have been built for.
        words: blocks with fewer ordinary tokens are left out; the others are numbered through.

    Attributes:
        block_size: S.
        documents: number of documents.
        unknown: share of unknown words among the tokens.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, key: str, words: int = 0) -> None:
        import pyarrow as pa

        self._origin = path, key
        regular_size(path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
            for batch, _ in batches:
                # That its lengths stay within the file: reading behind its end would kill the process.
                batch.validate()
        except (pa.ArrowException, IndexError) as error:
            raise ValueError(str(error)) from error
        about = _about(batches.pop()[1] if batches else None, key)
        if about.get("schema") != schema_text(reader.schema):
            raise ValueError("its columns are others")
        self.block_size: int = about["block_size"]
        self.documents: int = about["documents"]
        self.unknown: float = about["unknown"]
        self._parts, self._words = [], []
        for batch, metadata in batches:
            values, counts = (
                (batch.column(0).values.to_numpy(), batch.column(1).to_numpy())
                if batch.num_columns == 2
                else (np.empty(0), np.empty(0))
            )
            if (metadata or {}).get(b"checksum") != _checksum(values.data, counts.data):
                raise ValueError("a checksum differs")
            self._parts.append(values.reshape(-1, self.block_size))
            self._words.append(counts)
        length = sum(map(len, self._parts))
        if length != about["blocks"] or any(len(part) != _ROWS for part in self._parts[:-1]):
            raise ValueError("its number of blocks differs")
        self._choose(words)

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the file by itself.
        return Blocks, (*self._origin, self._fewest)

    def _choose(self, words: int) -> None:
        self._fewest = words
        lost = [_ROWS * part + np.flatnonzero(counts < words) for part, counts in enumerate(self._words)]
        places = np.concatenate([np.empty(0, np.int64), *lost])
        self._length = sum(map(len, self._words)) - len(places)
        # How many blocks are left in front of each that is left out.
        self._before = places - np.arange(len(places))

    def having(self, words: int) -> Blocks:
        """Return the blocks with at least so many ordinary tokens, numbered through."""
        chosen = copy.copy(self)
        chosen._choose(words)
        return chosen

    def words(self, share: float) -> int:
        """Return how many ordinary tokens at least this share of all blocks has, at the most."""
        counts = np.sort(np.concatenate(self._words))[::-1]
        return int(counts[max(0, math.ceil(share * len(counts)) - 1)])

    def rows(self, numbers_B: np.ndarray) -> np.ndarray:
        """Return the blocks of these numbers, whole numbers [B, S]."""
        places_B = numbers_B + np.searchsorted(self._before, numbers_B, side="right")
        return np.stack([self._parts[number // _ROWS][number % _ROWS] for number in places_B.tolist()])


def packed(corpus: Corpus, vocabulary: Vocabulary, block_size: int, folder: Path) -> Blocks:
    """Return the blocks of ``corpus``, from the file in ``folder`` where that is whole.

    Raises:
        DataError: the corpus has no document, or less than a block; it cannot be read, or ``folder`` not written.
    """
    key = cache_key(
        {"blocks": _FORMAT, "corpus": corpus.digest, "tokenizer": vocabulary.digest, "block_size": block_size}
    )

    def build(file: BinaryIO) -> None:
        _log.info("packing %s into blocks of %d tokens", corpus.name, block_size)
        _build(file, corpus, vocabulary, block_size, key)

    return build_once(folder / f"{key}.arrow", lambda path: Blocks(path, key), build)


def _build(file: BinaryIO, corpus: Corpus, vocabulary: Vocabulary, block_size: int, key: str) -> None:
    import pyarrow as pa

    small = len(vocabulary.ordinary_V) <= np.iinfo(np.uint16).max + 1
    number = pa.uint16() if small else pa.int32()
    schema = pa.schema([("input_ids", pa.list_(number, block_size)), ("words", pa.int32())])
    about: dict[str, Any] = {"key": key, "block_size": block_size, "documents": 0, "tokens": 0}
    about["schema"] = schema_text(schema)
    blocks, unknown = 0, 0

    def batch_of(blocks_NS: np.ndarray) -> tuple[pa.RecordBatch, bytes]:
        values = blocks_NS.ravel().astype(np.uint16 if small else np.int32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), block_size)
        words = vocabulary.ordinary_V[blocks_NS].sum(1, dtype=np.int32)
        return pa.record_batch([column, pa.array(words)], schema=schema), _checksum(values.data, words.data)

    with pa.ipc.new_file(file, schema) as writer:
        for blocks_NS in _blocks(corpus, vocabulary, block_size, about):
            batch, checksum = batch_of(blocks_NS)
            writer.write_batch(batch, custom_metadata={"checksum": checksum})
            blocks += len(blocks_NS)
            unknown += int((blocks_NS == vocabulary.unknown).sum()) if vocabulary.unknown is not None else 0
        if not blocks:
            documents, tokens = about["documents"], about["tokens"]
            has = f"{tokens} tokens in {documents} documents" if documents else "no text"
            allowed = f"allowed with block_size {block_size}: {block_size - 1} tokens"
            raise DataError(f"{corpus.name}: has {has}; {allowed}{corpus.advice}")
        # What is known at the end goes to the end.
        about |= {"blocks": blocks, "unknown": unknown / (blocks * block_size)}
        batch, _ = batch_of(np.empty((0, block_size), np.int32))
        content = json.dumps(about).encode()
        writer.write_batch(batch, custom_metadata={"about": content, "checksum": _checksum(content)})


def _blocks(corpus: Corpus, vocabulary: Vocabulary, block_size: int, about: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield int32 [N, S], the last time perhaps fewer; count documents and tokens in ``about``."""
    size = block_size - 1
    rest_T = np.empty(0, np.int32)
    for part_T in _stream(corpus, vocabulary, about):
        rest_T = np.concatenate([rest_T, part_T])
        about["tokens"] += len(part_T)
        while len(rest_T) >= size * _ROWS:
            yield _with_first(rest_T[: size * _ROWS].reshape(_ROWS, size), vocabulary.first)
            rest_T = rest_T[size * _ROWS :]
    if len(rest_T) >= size:
        yield _with_first(rest_T[: len(rest_T) // size * size].reshape(-1, size), vocabulary.first)


def _with_first(rows: np.ndarray, first: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=first)


def _stream(corpus: Corpus, vocabulary: Vocabulary, about: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield the tokens of all documents, each followed by a separator, int32 [T]; those without tokens are left out."""
    separator = np.array([vocabulary.separator], np.int32)
    document, filled = -1, False
    for pieces in _together(corpus):
        parts = []
        encodings = vocabulary.encoder.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        for piece, encoding in zip(pieces, encodings, strict=True):
            if piece.document != document:
                if filled:
                    parts.append(separator)
                document, filled = piece.document, False
            if ids := encoding.ids:
                about["documents"] += not filled
                filled = True
                parts.append(np.array(ids, np.int32))
        if parts:
            yield np.concatenate(parts)
    if filled:
        yield separator


def _together(corpus: Corpus) -> Iterator[list[Piece]]:
    pieces: list[Piece] = []
    length = 0
    for piece in corpus.read():
        pieces.append(piece)
        length += len(piece.text)
        if length >= _TOGETHER:
            yield pieces
            pieces, length = [], 0
    if pieces:
        yield pieces


def _about(metadata: Mapping[bytes, bytes] | None, key: str) -> dict[str, Any]:
    """Return what the last record batch says of the file."""
    content = (metadata or {}).get(b"about", b"{}")
    about: dict[str, Any] = json.loads(content)
    if about.get("key") != key or metadata is None or metadata.get(b"checksum") != _checksum(content):
        raise ValueError("it is incomplete, or of another corpus")
    return about


def _checksum(*contents: bytes | memoryview) -> bytes:
    value = 0
    for content in contents:
        value = zlib.crc32(content, value)
    return str(value).encode()
