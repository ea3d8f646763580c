"""The adapters that a method starts from: their folders as a setting, and what is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peft_lightning.errors import UsageError
from peft_lightning.files.sources import knows_weights, read_source, source_names
from peft_lightning.layers.merge_sources import MergeSource

__all__ = ["read_sources", "source_paths"]


def source_paths(paths: Any, *, least: int = 1) -> list[str]:
    """The setting ``sources`` as plain values.

    Args:
        paths: a list of folders or files.
        least: how many there must be.

    Raises:
        UsageError: if it is something else, or there are fewer.
    """
    listed = isinstance(paths, Sequence) and not isinstance(paths, str)
    if not listed or len(paths) < least or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise UsageError(f"sources = {paths!r}: must be a list of {least} or more adapters' folders")
    return [str(path) for path in paths]


def read_sources(
    paths: Sequence[str], backbone: nn.Module, fingerprint: Mapping[str, Any]
) -> tuple[list[MergeSource], list[dict[str, Any]]]:
    """Read adapters that were made for one backbone.

    Args:
        paths: of their folders or checkpoints.
        backbone: the bare model.
        fingerprint: of it.

    Returns:
        The adapters, each under a name of its own, and where they come from, plain values; ``knows_weights`` says
        whether the backbone's weights were compared, or only its shape, for want of a record of them.

    Raises:
        CheckpointError: if one is missing, damaged, or was made for another backbone.
        UsageError: if one is pickled.
    """
    sources, origins = [], []
    for name, path in zip(source_names(paths), paths, strict=True):
        given = read_source(path, backbone=backbone, fingerprint=fingerprint)
        sources.append(MergeSource(name=name, adapter=given.adapter, tensors=given.tensors, masks=given.masks))
        known = {key: given.origin[key] for key in ("files", "seed", "task") if given.origin.get(key) is not None}
        origins.append({"name": name, **known, "knows_weights": knows_weights(given.origin)})
    return sources, origins
