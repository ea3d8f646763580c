"""How every benchmark is started, and where its lines go."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from peft_lightning.errors import PeftLightningError

__all__ = ["CONSOLE", "run"]

CONSOLE = Console(highlight=False, soft_wrap=True)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a failure that the user can act on is one line and an exit status."""
    try:
        main()
    except PeftLightningError as error:
        CONSOLE.print(f"error: {error}")
        sys.exit(error.exit_code)
