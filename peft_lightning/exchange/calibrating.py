"""Unlabelled batches for a merge, from a data module or from plain texts, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_lightning.backbones.positions import positions
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.errors import UsageError

__all__ = ["Batches", "calibration_batches"]

Batches = Callable[[], Iterable[Mapping[str, Any]]]
"""Gives model inputs, anew for each pass."""


def calibration_batches(
    data: Any, backbone: nn.Module, tokenizer: str, *, split: str, batch_size: int, max_length: int
) -> tuple[Batches, dict[str, Any]]:
    """Batches of model inputs and their identity.

    Args:
        data: a ``TaskDataModule``, which knows its own tokenizer, batch size and length, or a list of texts.
        backbone: that reads them.
        tokenizer: folder or hub name, for texts.
        split: which of a data module's stages: train, validation, test.
        batch_size: texts of a batch.
        max_length: tokens of a text at most.

    Raises:
        UsageError: if it is something else, an option is wrong, or the backbone cannot read it.
        DataError: if the data cannot be used.
    """
    if hasattr(data, "calibration_dataloader"):
        if split not in ("train", "validation", "test"):
            raise UsageError(f"split = {split!r}: must be train, validation or test")
        _check_fit(backbone, data.tokenizer, data.max_length)
        encoded = data.unlabelled(split)
        identity = {"task": data.task.name, "split": split, "rows": len(encoded), "digest": encoded.digest}
        sizes = {name: getattr(data, name) for name in ("batch_size", "max_length", "seed")}
        return lambda: _inputs(data.calibration_dataloader(split)), identity | sizes | _named(data.tokenizer)
    if isinstance(data, str) or not isinstance(data, Sequence) or not all(isinstance(text, str) for text in data):
        raise UsageError(f"data: must be a TaskDataModule or a list of texts, not {type(data).__name__}")
    if not data:
        raise UsageError("data: there is no text")
    if batch_size < 1 or max_length < 1:
        raise UsageError(f"batch_size = {batch_size}, max_length = {max_length}: must be at least 1")
    words = load_tokenizer(tokenizer)
    _check_fit(backbone, words, max_length)
    digest = hashlib.sha256("\n".join(data).encode()).hexdigest()
    identity = {"texts": len(data), "sha256": digest, "batch_size": batch_size, "max_length": max_length}

    def batches() -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(data), batch_size):
            rows = list(data[start : start + batch_size])
            yield words(rows, truncation=True, max_length=max_length, padding=True, return_tensors="pt")

    return batches, identity | _named(words)


def _inputs(loader: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for batch in loader:
        yield batch["inputs"]


def _named(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's name; a folder's place on this machine is nobody else's business."""
    name = str(getattr(tokenizer, "name_or_path", ""))
    return {"tokenizer": Path(name).name if Path(name).is_dir() else name}


def _check_fit(backbone: nn.Module, tokenizer: Any, max_length: int) -> None:
    config: Any = backbone.config
    if len(tokenizer) > config.vocab_size:
        raise UsageError(f"tokenizer: has {len(tokenizer)} words, the backbone embeds {config.vocab_size}")
    most = positions(backbone)
    if most is not None and max_length > most:
        raise UsageError(f"max_length = {max_length}: the backbone has {most} positions")
