"""metrics.csv: one row per logged step, appended as it comes, and cut back when a run goes on from a checkpoint.

Lightning's own CSV logger keeps rows in memory and deletes the file when a run is resumed.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import DataError, PeftLightningError, first_line
from peft_lightning.reading.limits import read_bytes

__all__ = ["MetricsCSV"]


class MetricsCSV(Logger):
    """A logger that writes ``metrics.csv`` into a run's folder.

    Args:
        folder: the run's folder, made if needed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: int | None = None

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """A run's folder holds one version."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    def read(self) -> list[dict[str, str]]:
        """All complete rows, as text."""
        if not self.path.exists():
            return []
        try:
            text = read_bytes(self.path).decode("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be gone on with ({first_line(error)})") from error
        whole = text[: text.rfind("\n") + 1]  # a killed process may have left half a line
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(io.StringIO(whole))]

    @property
    def rows(self) -> int:
        """How many complete rows there are."""
        if self._rows is None:
            self._rows = len(self.read())
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row; a new column rewrites the file once.

        Raises:
            PeftLightningError: if the disk refuses.
        """
        row = {"step": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        with self._failing_clearly():
            rows, columns = self.rows, self._columns()
            if not set(row) <= set(columns):
                self._write([*self.read(), row])
            else:
                with open(self.path, "a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
            self._rows = rows + 1

    @rank_zero_only
    def cut(self, rows: int) -> None:
        """Keep the first ``rows`` rows only.

        Raises:
            PeftLightningError: if the disk refuses.
        """
        with self._failing_clearly():
            kept = self.read()[:rows]
            if self.path.exists():
                self._write(kept)
            self._rows = len(kept)

    @rank_zero_only
    def sync(self) -> None:
        """Make sure that the rows are on the disk."""
        with self._failing_clearly():
            if self.path.exists():
                with open(self.path, "rb") as file:
                    os.fsync(file.fileno())

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PeftLightningError(f"{self.path}: cannot be written ({error.strerror}); training stops") from error

    def _columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _write(self, rows: list[dict[str, str]]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path, lambda file: file.write(buffer.getvalue().encode()))
