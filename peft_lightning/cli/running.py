"""What a configuration adds to a run: its callbacks and loggers, in the run's folder."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from peft_lightning.atomic import atomic_write, lock_file
from peft_lightning.callbacks.stopping import StayStopped
from peft_lightning.errors import PeftLightningError, UsageError
from peft_lightning.files.checksum import sum_of

__all__ = ["Agreed", "Held", "Kept", "listed", "placed"]

# Seconds that a run's folder is waited for: a job that is put back into the queue may meet itself, ending.
_PATIENCE = 60.0


class Held(Callback):
    """Keeps two processes from training into one folder: the second one waits a while, and is refused.

    A lock of the file system's, which ends with the process however that ends. Where there are none, nothing is held.

    Args:
        folder: the run's.
        patience: seconds to wait.
    """

    _all: ClassVar[list[Held]] = []

    @classmethod
    @contextmanager
    def released(cls) -> Iterator[None]:
        """At the end of this all locks are let go, whatever ends it."""
        try:
            yield
        finally:
            while cls._all:
                cls._all.pop().release()

    def __init__(self, folder: str | Path, patience: float = _PATIENCE) -> None:
        self.path, self.patience = Path(folder) / ".lock", patience
        self._file: IO[bytes] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the lock, in the first process, unless it has it.

        Raises:
            UsageError: another run has it: what this one begins with may be out of date when that one ends.
        """
        if trainer.is_global_zero and self._file is None:
            self.take(0.0)

    def take(self, patience: float | None = None) -> None:
        """Take the lock.

        Args:
            patience: seconds to wait; by default the object's.

        Raises:
            UsageError: another run has it.
            PeftLightningError: the folder cannot be written to.
        """
        patience = self.patience if patience is None else patience
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = file = lock_file(self.path)
        except OSError as error:
            raise PeftLightningError(
                f"--run_dir = {self.path.parent}: cannot be written to ({error.strerror}: {error.filename})"
            ) from error
        self._all.append(self)
        until, said = time.monotonic() + patience, False
        while _is_taken(file):
            if time.monotonic() >= until:
                self.release()
                raise UsageError(f"--run_dir = {self.path.parent}: another process trains into it; name another folder")
            if not said:
                sys.stderr.write(f"peft-lightning: another process trains into {self.path.parent}: waits for its end\n")
            said = True
            time.sleep(min(1.0, patience / 4))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go."""
        self.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go."""
        self.release()

    def release(self) -> None:
        """Let go of the lock, if it is held."""
        if self._file is not None:
            self._file.close()
        self._file = None


class Agreed(Callback):
    """Compares what the processes of a job go on from, before any of them takes it: each has looked for itself.

    Args:
        path: of this process's checkpoint; None where it found none.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse different ones, in every process.

        Raises:
            UsageError: says what the first process found, and what the first of those found that differ from it.
        """
        if trainer.world_size == 1:
            return
        found: list[tuple[str, str]] = [("", "")] * trainer.world_size
        own = sum_of(self.path) if self.path and Path(self.path).is_file() else ""  # an adapter's folder has none
        dist.all_gather_object(found, (str(self.path), own) if self.path else ("none", ""))
        first = _told(*found[0])
        for rank, (path, digest) in enumerate(found):
            if digest != found[0][1] or (path == "none") != (found[0][0] == "none"):
                raise UsageError(
                    f"checkpoint to go on from: process 0 found {first}, process {rank} found {_told(path, digest)}; "
                    "the run's folder must be one that all nodes see, and no other job may train into it meanwhile"
                )


class Kept(Callback):
    """Writes a run's configuration once the training has begun with it.

    Args:
        path: of the file.
        text: its content.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write it before the first batch: what module and data refuse, they have refused by then."""
        self._write()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it where there was no batch to come."""
        self._write()

    def _write(self) -> None:
        if self.text:
            atomic_write(self.path, lambda file: file.write(self.text.encode()))
            self.text = ""


def _is_taken(file: IO[bytes]) -> bool:
    """Lock the file, unless another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some file systems of clusters know no locks
        return False
    return False


def _told(path: str, digest: str) -> str:
    return f"{path} (SHA-256 {digest[:12]})" if digest else path


def listed(value: Any) -> list[Any]:
    """A list of what the parser gives as a list, as one value, or not at all."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def placed(callbacks: Any, folder: Path) -> list[Any]:
    """The user's callbacks: further checkpoints go to ``best_k`` in the run's folder, and what has stopped stays so."""
    found = listed(callbacks)
    for callback in found:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder / "best_k")
            callback._enable_version_counter = False  # a step that is repeated after a kill takes its own file's place
    return [*found, StayStopped()] if any(isinstance(callback, EarlyStopping) for callback in found) else found
