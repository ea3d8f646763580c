"""What a cell of a study is known by, also in a later process.

A cell's digest is over everything that decides its result: the method with all its arguments, the content of the files
that they name, the backbone's weights, the rows and the tokenizer, epochs, precision, and this package's version. Not
over how many cells are trained side by side, where files lie, or what its task and method are called in the grid.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_lightning import __version__
from peft_lightning.backbones.build import BackboneConfig, build_backbone, fingerprint
from peft_lightning.study.cells import Cell

__all__ = ["Identities"]

# What does not decide a cell's result, or is in the digest as what it stands for.
_ELSEWHERE = ("task", "root", "cache_dir", "eval_batch_size", "shots")


class Identities:
    """Digests of cells; each file and each backbone is read once."""

    def __init__(self) -> None:
        self._contents: dict[str, str] = {}
        self._weights: dict[str, str] = {}

    def digest(self, cell: Cell, rows: Mapping[str, str]) -> str:
        """Return what a cell's file is called.

        Args:
            cell: which.
            rows: what identifies the rows and the tokenizer.

        Raises:
            UsageError: an argument has a value that is not allowed, or the backbone cannot be loaded.
        """
        module = cell.module()
        settings = dict(module.hparams)
        backbone = {
            name: value for name, value in settings.pop("backbone").items() if name not in ("name", "tokenizer")
        }
        given = {name: value for name, value in cell.arguments.items() if name not in ("backbone", "optim")}
        regime = {name: value for name, value in asdict(cell.regime).items() if name not in _ELSEWHERE}
        identity = {
            "package": __version__,
            "class": f"{cell.kind.__module__}.{cell.kind.__qualname__}",
            "settings": self._with_contents(settings, set(_paths(given))),
            "backbone": {**backbone, "weights": self._weights_of(module.backbone_config)},
            "data": {**regime, "shots": cell.shots, "seed": cell.seed, **rows},
            "training": {"epochs": cell.epochs, "precision": cell.precision, "select": cell.select},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:20]

    def _with_contents(self, value: Any, paths: set[str]) -> Any:
        """The same with the digest of what a path leads to in its place."""
        if isinstance(value, Mapping):
            return {name: self._with_contents(part, paths) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._with_contents(part, paths) for part in value]
        if not (isinstance(value, str) and value in paths):
            return value
        if value not in self._contents:
            self._contents[value] = _content(Path(value).expanduser())
        return self._contents[value]

    def _weights_of(self, config: BackboneConfig) -> str:
        """What identifies a backbone's weights; those of a random one follow from its settings and the seed."""
        if config.name is None:
            return "random"
        key = f"{config.name} {config.revision}"
        if key not in self._weights:
            self._weights[key] = str(fingerprint(build_backbone(config))["weights"])
        return self._weights[key]


def _paths(value: Any) -> Iterator[str]:
    """All texts that name a file or folder and look like a path."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(part)
    elif isinstance(value, str | os.PathLike) and os.sep in str(value) and Path(value).expanduser().exists():
        yield str(value)


def _content(place: Path) -> str:
    """A digest over the files at a path, by their place under it."""
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            with file.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{file.relative_to(place) if file != place else ''} {found}\n".encode())
    return digest.hexdigest()
