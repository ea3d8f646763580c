"""Every kind of task on real data, dense and with 40 % of the adapters' weights removed, beside the trivial answer.

``--part learn`` trains (recipes: benchmarks/tasks_arms.py), ``--part speed`` measures what SQuAD's data costs. Every
run writes one JSON file and is not repeated once that is there; the tables are made from these files alone. The number
of an arm is the validation metric after its last step: nothing is chosen by looking.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.runs import run_missing
from benchmarks.script import CONSOLE, run, suite_options
from benchmarks.shared import ROOT, clean_environment
from benchmarks.tasks_arms import SUITES
from benchmarks.tasks_speed import measure_squad, squad_costs_table
from benchmarks.tasks_table import kinds_table
from peft_lightning.study.records import read_record, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main"]

_DOCUMENT = ROOT / "benchmarks" / "RESULTS.md"
_NAMES = [suite.name for suite in SUITES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=["learn", "speed", "all"], default="all", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    options = suite_options(parser, [*_NAMES, "all"], "all", arguments)
    tiny = ROOT / "runs" / "bench-tiny" / "tasks"
    folder: Path = options.out or (tiny if options.tiny else ROOT / "benchmarks" / "results" / "tasks")
    places = not options.tiny and options.out is None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = {} if options.report else clean_environment(options.allow_dirty or options.tiny)
    torch.set_num_threads(options.threads)
    if options.part in ("speed", "all"):
        if not options.report:
            write_record(folder / "speed.json", measure_squad(options.tiny, environment))
        _show(squad_costs_table(read_record(folder / "speed.json")), "tasks-speed", places)
    if options.part in ("learn", "all"):
        chosen = [suite for suite in SUITES if options.suite in (suite.name, "all")]
        if not options.report:
            for suite in chosen:
                runs = suite.runs(tiny=options.tiny, device=options.device, encoder=options.encoder)
                run_missing(runs, folder, environment, CONSOLE)
        _show(kinds_table(SUITES, folder), "tasks", places)


def _show(text: str, section: str, places: bool) -> None:
    if places:
        write_generated(_DOCUMENT, section, text)
        if section == "tasks":
            write_generated(ROOT / "README.md", section, text)
    CONSOLE.print(text)


if __name__ == "__main__":
    run(main)
