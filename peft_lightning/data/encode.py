"""From the raw rows of a split to its encoded columns, through the cache."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
        "tokenizer": _content(tokenizer),
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
        keep = _labelled(rows, kind.task) if options["labelled"] else [True] * count
        if any(keep):
            try:
                columns = kind.encode(rows, tokenizer, **options, first_row=first_row)
            except DataError as error:
                raise DataError(f"{source.name}: {error}") from error
            _collect(parts, columns, keep, f"{source.name}: row", first_row)
        first_row += count
    if not parts:
        raise DataError(f"{source.name}: has no row with a label; allowed: at least one")
    return pa.RecordBatch.from_pydict({name: pa.concat_arrays(arrays) for name, arrays in parts.items()})


def _labelled(rows: dict[str, list[Any]], task: Task) -> list[bool]:
    """Whether each row has a label; those that have none get another row's, with which they can be encoded."""
    keep = [str(label) not in task.unlabelled for label in rows[task.label]]
    spare = next((label for label, kept in zip(rows[task.label], keep, strict=True) if kept), None)
    rows[task.label] = [label if kept else spare for label, kept in zip(rows[task.label], keep, strict=True)]
    return keep


def _collect(
    parts: dict[str, list[pa.Array]], columns: Mapping[str, Sequence[Any]], keep: list[bool], what: str, first_row: int
) -> None:
    """Add the encoded rows to keep."""
    import pyarrow as pa

    for number, tokens in enumerate(columns["input_ids"], first_row):
        if not len(tokens):
            raise DataError(f"{what} {number} has no tokens; allowed: at least one")
    for name, values in columns.items():
        kept = [value for value, wanted in zip(values, keep, strict=True) if wanted]
        parts.setdefault(name, []).append(pa.array(kept, _arrow_type(kept[0])))


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


def _content(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    # A call leaves its own truncation and padding behind in the backend.
    content.update(truncation=None, padding=None)
    content["special"] = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side]
    content["special"].append({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
