"""From encoded columns of a few rows to the tensors of a batch.

Most rows are one sequence of tokens. A row of a choice or of a long passage is several; they lie side by side in the
batch, and ``inputs["sequences"]`` says how many are each row's.

Shapes: B rows, N sequences (B, where each row has one), L tokens of the longest sequence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_lightning.errors import UsageError

__all__ = ["Batch", "batch_of_lists", "chosen", "make_batch", "rows_of"]

Batch = Mapping[str, Any]
_IGNORED = -100  # what PyTorch's losses leave out


def make_batch(
    scalars: Mapping[str, np.ndarray],
    ragged: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    pad_token_id: int,
) -> dict[str, Any]:
    """Pad the columns of B rows.

    Args:
        scalars: [B] per column.
        ragged: per column the values of all rows end to end, and how many are each row's [B]. ``sizes`` holds the
            tokens of each sequence where rows have several; ``input_ids`` and columns called ``token_...`` have one
            value a token. ``reference`` holds the bytes of a JSON object.
        pad_token_id: fills ``input_ids`` up to the longest sequence.

    Returns:
        ``inputs``: int64 [N, L] for the values of tokens, with ``attention_mask``, int64 [B] for other columns and
        for ``sequences`` where rows have several. ``labels``, if there are any: [B], or int64 [B, K] filled up with
        -100. ``references``, if there are any: B plain values.
    """
    columns: dict[str, Any] = {name: torch.from_numpy(values) for name, values in scalars.items()}
    sizes, counts = ragged.get("sizes", (None, None))
    result: dict[str, Any] = {}
    for name, (values, lengths) in ragged.items():
        if name == "reference":
            ends = np.cumsum(lengths)
            parts = [values[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]
            result["references"] = [json.loads(part) for part in parts]
        elif name == "labels":
            columns[name] = _padded(values, lengths, _IGNORED)[0]
        elif name != "sizes":
            cut = sizes if sizes is not None and _of_tokens(name) else lengths
            padding = pad_token_id if name == "input_ids" else 0
            columns[name], filled = _padded(values, cut, padding)
            if name == "input_ids":
                columns["attention_mask"] = filled
    if counts is not None:
        columns["sequences"] = torch.from_numpy(counts.astype(np.int64))
    if "labels" in columns:
        result["labels"] = columns.pop("labels")
    return {"inputs": columns, **result}


def batch_of_lists(columns: Mapping[str, Sequence[Any]], *, pad_token_id: int) -> dict[str, Any]:
    """The same from lists: a list or an array of numbers a row where ragged, text for ``reference``, else a number.

    A column that begins with lists of lists holds one list a sequence.
    """
    scalars, ragged = {}, {}
    for name, values in columns.items():
        if isinstance(values[0], str):
            values = [list(value.encode()) for value in values]
        if isinstance(values[0], list | np.ndarray):
            flat = np.array([number for value in values for number in value], np.int64)
            kind = np.uint8 if name == "reference" else np.int64
            ragged[name] = flat.astype(kind), np.array([len(value) for value in values])
        else:
            scalars[name] = np.array(values)
    return make_batch(scalars, ragged, pad_token_id=pad_token_id)


def rows_of(texts: Any, parts: Sequence[str], columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return rows, of what a person gives to have answered.

    Args:
        texts: a list of texts (or of lists of words), of as many texts as there are ``parts``, or of rows as mappings.
        parts: the columns that texts stand for.
        columns: those that a row must have.

    Raises:
        UsageError: a row does not have them.
    """
    if isinstance(texts, str | Mapping):
        raise UsageError(f"texts: give a list, not one {'text' if isinstance(texts, str) else 'row'}")
    rows = []
    for number, text in enumerate(texts):
        row = _row_of(text, parts)
        if missing := [name for name in columns if row is None or row.get(name) is None]:
            given = f"has no {missing[0]!r}" if row is not None else f"is a {type(text).__name__}"
            many = len(parts) == len(columns) > 1
            form = (
                f"{len(parts)} texts or a mapping"
                if many
                else "a mapping"
                if len(columns) > 1
                else "a text or a mapping"
            )
            raise UsageError(f"texts[{number}] {given}; allowed: {form} with {', '.join(columns)}")
        rows.append(row or {})
    return rows


def _row_of(text: Any, parts: Sequence[str]) -> Mapping[str, Any] | None:
    """What a person gave as a row, or None where it is no row at all."""
    if isinstance(text, Mapping):
        return text
    if len(parts) == 1 and isinstance(text, Sequence):
        return {parts[0]: text if isinstance(text, str) or len(text) != 1 else text[0]}
    if isinstance(text, Sequence) and not isinstance(text, str) and len(text) == len(parts):
        return dict(zip(parts, text, strict=True))
    return None


def chosen(values: Any, keep_B: Tensor) -> Any:
    """Return the rows to keep of a tensor [B, ...] or of a list of B."""
    if isinstance(values, Tensor):
        return values[keep_B]
    return [value for value, keep in zip(values, keep_B.tolist(), strict=True) if keep]


def _of_tokens(name: str) -> bool:
    return name == "input_ids" or name.startswith("token_")


def _padded(values: np.ndarray, lengths: np.ndarray, fill: int) -> tuple[Tensor, Tensor]:
    """int64 [rows, longest], and 1 where there is a value."""
    filled = np.arange(int(lengths.max())) < lengths[:, None]
    padded = np.full(filled.shape, fill, np.int64)
    padded[filled] = values
    return torch.from_numpy(padded), torch.from_numpy(filled.astype(np.int64))
