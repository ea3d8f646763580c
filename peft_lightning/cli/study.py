"""``study``: a grid of many small runs in one process or a few, gone on with where it stopped, and its table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_lightning.atomic import atomic_write
from peft_lightning.cli.parser import ToolParser, plain_notes
from peft_lightning.errors import PeftLightningError, UsageError

__all__ = ["run_study_command"]


def run_study_command(words: list[str]) -> None:
    """Carry out ``study``.

    Args:
        words: the command and its options.

    Raises:
        UsageError: for wrong options or a wrong grid.
        DataError: if a task's data cannot be used, or the folder not written.
        PeftLightningError: in the end, if cells failed.
        SystemExit: after ``--help``.
    """
    given = _parser().parse_args(words[1:])
    values = _values(given.config)
    options = {name: getattr(given, name) for name in ("side_by_side", "workers", "device")}
    values |= {name: value for name, value in options.items() if value is not None}
    output = Path(given.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"output = {output}: is a file; must be a folder")

    from peft_lightning.study.grid import read_grid
    from peft_lightning.study.results import majorities
    from peft_lightning.study.runner import run_study
    from peft_lightning.study.summary import below_majority, summary
    from peft_lightning.study.tables import markdown_table

    with plain_notes():
        records = run_study(read_grid(values), output)
    failed = [record for record in records if "error" in record]
    if rows := summary(records, majorities(output)):
        low = below_majority(rows)
        text = "\n\n".join(filter(None, [markdown_table(rows), low]))
        atomic_write(output / "summary.md", lambda file: file.write(f"{text}\n".encode()))
        _show(rows)
        if low:
            sys.stdout.write(f"note: {low}\n")
    if failed:
        first = failed[0]
        which = ", ".join(f"{name} {value}" for name, value in first["cell"].items())
        raise PeftLightningError(
            f"{len(failed)} of {len(records)} cells failed, and are tried again by the same command; the first one "
            f"({which}): {first['error']}"
        )


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="peft-lightning study",
        description="Run a grid (method x variant x task x shots x seed x rate x epochs) in one process or a few: "
        "backbone and data are loaded once, and cells whose shapes allow it are trained side by side in a batch. What "
        "is finished in the folder is not repeated. The table names the variant that was best on the dev shots, and "
        "its mean over seeds on the rows that are reported on, with a t interval where there are three seeds or more.",
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="the grid; of several, later ones come first"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new, or of the study to go on with")
    parser.add_argument("--side_by_side", type=int, help="cells in one batch at most; 1: each alone")
    parser.add_argument("--workers", type=int, help="processes that share out cells and threads (default: 1)")
    parser.add_argument("--device", help="auto, cpu or cuda")
    return parser


def _values(files: Sequence[str]) -> dict[str, Any]:
    """The files' content, merged."""
    from jsonargparse import get_loader

    from peft_lightning.cli.yaml_files import check_yaml
    from peft_lightning.study.grid import merged_settings

    values: dict[str, Any] = {}
    for name in files:
        text = check_yaml(name)
        try:
            content = get_loader("yaml")(text)
        except Exception as error:  # whatever a value of the file leads to, it means the same
            raise UsageError(f"config = {name}: is no YAML ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict):
            raise UsageError(f"config = {name}: must hold a mapping")
        values = merged_settings(values, content)
    return values


def _show(rows: Sequence[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table()
    for name in shown:
        table.add_column(name)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    # A file is as wide as a line is long.
    Console(markup=False, width=None if sys.stdout.isatty() else 400).print(table)
