"""What methods share that start from pretrained adapters: their folders as a setting, which a file makes needless.

Lightning builds a module first, and reads a file into it then. So where a folder is gone and a file may still come, the
module is built without adapters; :meth:`SourcedModule.take_shape` builds it anew when the file has said what they are,
and :meth:`SourcedModule.begin` refuses to start where none came.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peft_lightning.errors import CheckpointError
from peft_lightning.task_module import TaskModule

__all__ = ["SourcedModule"]

_LOADING: ContextVar[bool] = ContextVar("loading", default=False)


class SourcedModule(TaskModule):
    """Base of the methods that put pretrained adapters together; a file of theirs holds all of these that they use."""

    fixed_by_file = (*TaskModule.fixed_by_file, "sources")
    _gone: str | None = None

    @classmethod
    def load_from_checkpoint(cls, *given: Any, **options: Any) -> Any:
        """As Lightning's; the folders that the file was made from need not be there."""
        before = _LOADING.set(True)
        try:
            return super().load_from_checkpoint(*given, **options)
        finally:
            _LOADING.reset(before)

    def waits_for_file(self, folders: Iterable[str]) -> bool:
        """Whether one of the folders is gone and a file may still come: then nothing of theirs can be built yet."""
        may_come = self._trainer is not None or _LOADING.get()
        self._gone = next((folder for folder in folders if may_come and not Path(folder).exists()), None)
        return self._gone is not None

    def take_shape(self) -> None:
        """Have the module built anew, where it was built without adapters; for a file that says what they are."""
        if self._gone is not None:
            self._gone, self._built = None, False

    def begin(self) -> None:
        """What comes before the first batch of a fit, a validation, a test or predictions.

        Raises:
            CheckpointError: if a source is gone and no file made it needless.
        """
        if self._gone is not None:
            raise CheckpointError(f"{self._gone}: there is no such folder or checkpoint")

    def on_fit_start(self) -> None:
        """Begin, before the first validation."""
        super().on_fit_start()
        self.begin()

    def on_validation_start(self) -> None:
        """Begin a validation without a fit."""
        self.begin()

    def on_test_start(self) -> None:
        """Begin a test without a fit."""
        self.begin()

    def on_predict_start(self) -> None:
        """Begin predictions without a fit."""
        self.begin()
