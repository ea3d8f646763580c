"""How every benchmark is started, and where its lines go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from peft_lightning.errors import PeftLightningError, UsageError

__all__ = ["CONSOLE", "run", "suite_options"]

CONSOLE = Console(highlight=False, soft_wrap=True, markup=False)


def suite_options(
    parser: argparse.ArgumentParser, suites: Iterable[str], default: str, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the options that all benchmarks of real runs in suites have, and those that ``parser`` has already.

    Raises UsageError where the suite ``gpu`` is asked for without a GPU, or another encoder without a folder.
    """
    parser.add_argument("--suite", choices=list(suites), default=default, help="which runs (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--encoder", help="folder or hub name of another encoder; its records go into --out")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figures from the records")
    parser.add_argument("--tiny", action="store_true", help="try it in a minute: toy data, random encoder, few steps")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the records say so")
    parser.add_argument("--out", type=Path, help="folder of records and figures; the documents stay as they are")
    options = parser.parse_args(arguments)
    if options.suite == "gpu" and options.device != "cuda" and not (options.tiny or options.report):
        raise UsageError(f"--device {options.device}: the suite gpu needs cuda, or --tiny")
    if options.encoder and not options.out:
        raise UsageError(f"--encoder {options.encoder}: give --out too, a folder of its own for another encoder")
    return options


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; a failure that the user can act on is one line and an exit status."""
    try:
        main()
    except PeftLightningError as error:
        CONSOLE.print(f"error: {error}")
        sys.exit(error.exit_code)
