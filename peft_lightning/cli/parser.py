"""Options of the commands that are not LightningCLI's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from peft_lightning.errors import UsageError

__all__ = ["ToolParser"]


class ToolParser(argparse.ArgumentParser):
    """Options in full words only, and a wrong one is a usage error of one line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('peft-lightning ')}: {message}")
