"""What a cell of a study is known by, also in a later process.

A cell's digest is over everything that decides its result: the method with all its arguments, the content of the
files that they name, the backbone's weights and configuration, the rows and the tokenizer, epochs or steps, precision,
and this package's version. Not over how many cells are trained side by side, where files lie, or what its task and
method are called in the grid; nor over the commit, which each cell's file names: a changed source tree does not run
finished cells again.
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

_FILES = ("sources", "fusion", "file")
_NO_SHAPE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
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
            "backbone": {**backbone, "weights": self._backbone(module.backbone_config)},
            "data": {**regime, "shots": cell.shots, "seed": cell.seed, **rows},
            "training": {**_length(cell), "precision": cell.precision, "select": cell.select},
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

    def _backbone(self, config: BackboneConfig) -> str:
        """What identifies a backbone, weights and configuration; a random one follows from settings and seed."""
        if config.name is None:
            return "random"
        key = f"{config.name} {config.revision}"
        if key not in self._weights:
            backbone: Any = build_backbone(config)
            shape = {name: value for name, value in backbone.config.to_dict().items() if name not in _NO_SHAPE}
            found = [fingerprint(backbone)["weights"], shape]
            self._weights[key] = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()
        return self._weights[key]


def _length(cell: Cell) -> dict[str, Any]:
    return {"epochs": cell.epochs} if cell.steps is None else {"steps": cell.steps}


def _paths(value: Any, names_files: bool = False) -> Iterator[str]:
    """All texts that name a file or folder: those of arguments that say so, and what looks like a path."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _paths(part, name in _FILES)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _paths(part, names_files)
    elif isinstance(value, str | os.PathLike) and (names_files or os.sep in str(value)):
        if Path(value).expanduser().exists():
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
