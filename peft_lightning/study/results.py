"""What a study leaves in its folder: a JSON file a cell, written in one step, and what the cells are cells of.

A cell's file holds ``cell`` (what it is in its grid), ``metric`` (the task's first), ``dev`` and ``test`` (metrics and
loss), ``predictions`` and ``truths`` of the test rows, ``losses`` of the first steps, ``steps``, ``epoch`` (whose
weights were measured), ``skipped_steps``, ``trained_parameters``, ``seconds``, ``side_by_side`` (cells that shared the
batch) and ``versions``; of a cell that failed, ``error`` instead of results.
"""

from __future__ import annotations

import fcntl
import json
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from peft_lightning import __version__
from peft_lightning.atomic import atomic_write, lock_file
from peft_lightning.errors import DataError
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_bytes
from peft_lightning.reading.seal import sealed, unseal
from peft_lightning.study.records import environment

__all__ = ["StudyFolder", "majorities", "read_study", "versions", "write_json"]

Record = dict[str, Any]
_RESULTS = {"metric", "dev", "test", "predictions", "truths", "steps", "trained_parameters"}


class StudyFolder:
    """The files of a study.

    Args:
        folder: made if needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, digest: str) -> Path:
        """Return the file of a cell."""
        return self.folder / "cells" / f"{digest}.json"

    def finished(self, digest: str) -> Record | None:
        """Return a cell's record if it is there and did not fail; a damaged file counts as none."""
        try:
            record = _read(self.path(digest))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and _RESULTS <= record.keys() else None

    def replaced(self, digests: Collection[str]) -> str | None:
        """Return a line on the finished cells of the folder's last grid that are not among ``digests``, if any are."""
        try:
            last = [
                key for digest, key in _about(self.folder, "cells") if digest not in digests and self.finished(digest)
            ]
        except DataError:
            return None
        if not last:
            return None
        names = {name: ", ".join(dict.fromkeys(str(key[name]) for key in last)) for name in ("method", "task")}
        return (
            f"output = {self.folder}: holds {len(last)} finished cells that this grid does not have (method "
            f"{names['method']}; task {names['task']}); their files stay, the summary becomes this grid's"
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other studies out of the folder, as far as its file system knows locks.

        Raises:
            DataError: another one is at work there, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = lock_file(self.folder / ".lock")
        except OSError as error:
            raise DataError(f"output = {self.folder}: cannot be written ({error})") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"output = {self.folder}: another study is at work there") from None
            except OSError:  # a file system without locks: cells' files appear whole all the same
                pass
            yield

    def write(self, digest: str, record: Record) -> None:
        """Write a cell's file.

        Raises:
            DataError: it cannot be written, or holds what JSON has no form for.
        """
        write_json(self.path(digest), record)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values in one step.

    Raises:
        DataError: the disk refuses, or JSON has no form for a value.
    """
    try:
        text = json.dumps(sealed(content), allow_nan=False)
        atomic_write(path, lambda file: file.write(f"{text}\n".encode()))
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def read_study(folder: str | Path) -> list[Record]:
    """Return the finished cells of a study's folder, in the order and under the names of its last grid.

    Raises:
        DataError: the folder holds no study.
    """
    place, cells = StudyFolder(folder), _about(folder, "cells")
    found = [(place.finished(digest), key) for digest, key in cells]
    return [{**record, "cell": key} for record, key in found if record is not None]


def majorities(folder: str | Path) -> dict[str, dict[str, float]]:
    """Return task -> metrics of its majority class, of a study that has come to its end.

    Raises:
        DataError: the folder holds no such study.
    """
    return dict(_about(folder, "majority"))


def _about(folder: str | Path, name: str) -> Any:
    try:
        content = _read(Path(folder) / "study.json")
        cells = content["cells"]
        if not all(re.fullmatch("[0-9a-f]{8,64}", digest) and isinstance(key, dict) for digest, key in cells):
            raise ValueError("a cell has no digest, or is no mapping")
        return content[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: holds no study ({error!r})") from error


def _read(path: Path) -> Any:
    """A JSON file; a digest that it has agrees with the rest.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    content = parse_json(read_bytes(path))
    if isinstance(content, dict):
        unseal(content)
    return content


def versions(device: torch.device) -> dict[str, str]:
    """Return what a result was made with."""
    about = environment()
    packages = {name: metadata.version(name) for name in ("torch", "lightning", "transformers")}
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    commit = f"{about['commit']}{' (changed)' if about['dirty'] else ''}" if about["commit"] else "none"
    ours = {"peft_lightning": __version__, "commit": commit}
    return {**ours, "python": platform.python_version(), **packages, "device": name}
