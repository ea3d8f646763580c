"""Options of the commands that are not LightningCLI's."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from peft_lightning.errors import UsageError

__all__ = ["ToolParser", "plain_notes"]


class ToolParser(argparse.ArgumentParser):
    """Options in full words only, and a wrong one is a usage error of one line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('peft-lightning ')}: {message}")


@contextmanager
def plain_notes() -> Iterator[None]:
    """Print what this package warns of as plain lines; others' warnings stay as they are, wherever they point."""
    show = warnings.showwarning

    def plain(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
        if category.__module__.partition(".")[0] == "peft_lightning":
            sys.stdout.write(f"note: {message}\n")
        else:
            show(message, category, *rest, **more)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="peft_lightning")
        warnings.showwarning = plain
        yield
