"""From the raw rows of a split to its encoded columns, through the cache."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_lightning import __version__
from peft_lightning.data.cache import Encoded, cache_key, cached
from peft_lightning.data.source import Source
from peft_lightning.errors import DataError
from peft_lightning.tasks.kinds.base import Kind
from peft_lightning.tasks.table import Task

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_split", "tokenizer_digest"]

# Enough rows for a fast tokenizer to use all cores, few enough to hold as Python lists.
_SLICE = 1000


def encode_split(
    source: Source,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    labelled: bool,
    references: bool,
    folder: Path,
) -> Encoded:
    """Return the encoded rows of ``source``, from ``folder`` where they were encoded before.

    Raises:
        DataError: a row or a column cannot be used, or the cache cannot be written.
    """
    parts = {
        "package": __version__,
        "source": source.digest,
        "task": asdict(kind.task),
        "kind": _code(kind),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "labelled": labelled,
        "references": references,
    }
    options = {"max_length": max_length, "labelled": labelled, "references": references}
    return cached(folder, cache_key(parts), lambda: _encode(source, kind, tokenizer, options))


def _encode(
    source: Source, kind: Kind, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> pa.RecordBatch:
    import pyarrow as pa

    parts: dict[str, list[pa.Array]] = {}
    first_row = 0
    for rows in source.slices(kind.columns(options["labelled"]), _SLICE, kind.task.also):
        count = len(next(iter(rows.values())))
        for start, end in _labelled(rows, kind.task, count) if options["labelled"] else [(0, count)]:
            part = {name: values[start:end] for name, values in rows.items()}
            try:
                columns = kind.encode(part, tokenizer, **options, first_row=first_row + start)
            except DataError as error:
                raise DataError(f"{source.name}: {error}") from error
            _collect(parts, columns, f"{source.name}: row", first_row + start)
        first_row += count
    if not parts:
        raise DataError(f"{source.name}: has no row with a label; allowed: at least one")
    return pa.RecordBatch.from_pydict({name: pa.concat_arrays(arrays) for name, arrays in parts.items()})


def _labelled(rows: Mapping[str, Sequence[Any]], task: Task, count: int) -> list[tuple[int, int]]:
    """Where each run of rows with a label begins and ends."""
    if not task.unlabelled:
        return [(0, count)]
    without = [-1, *(row for row, label in enumerate(rows[task.label]) if str(label) in task.unlabelled), count]
    return [(before + 1, after) for before, after in pairwise(without) if after > before + 1]


def _collect(parts: dict[str, list[pa.Array]], columns: Mapping[str, Sequence[Any]], what: str, first_row: int) -> None:
    """Add encoded rows."""
    import pyarrow as pa

    for number, tokens in enumerate(columns["input_ids"], first_row):
        if not len(tokens):
            raise DataError(f"{what} {number} has no tokens; allowed: at least one")
    for name, values in columns.items():
        parts.setdefault(name, []).append(pa.array(list(values), _arrow_type(values[0])))


def _arrow_type(value: Any) -> pa.DataType:
    import pyarrow as pa

    if isinstance(value, list | np.ndarray):
        return pa.large_list(pa.int32())
    if isinstance(value, str):
        return pa.large_string()
    return pa.float32() if isinstance(value, float) else pa.int64()


def _code(kind: Kind) -> list[str]:
    """The source text of all that may encode, or a class's name where there is none to read, as in a console."""
    ours = Path(inspect.getfile(Kind)).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in sorted(ours.rglob("*.py"))]
    for cls in type(kind).__mro__:
        if issubclass(cls, Kind) and not cls.__module__.startswith("peft_lightning.tasks."):
            try:
                texts.append(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
            except (OSError, TypeError):
                texts.append(f"{cls.__module__}.{cls.__qualname__}")
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what a tokenizer does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    # A call leaves its own truncation and padding behind in the backend, before what is added and the model.
    head, middle, rest = content.partition('"added_tokens"')
    special: list[Any] = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side]
    special.append({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    return hashlib.sha256(f"{json.dumps(special, sort_keys=True)} {rest if middle else head}".encode()).hexdigest()
