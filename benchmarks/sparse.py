"""SparseAdapter on real data: the five scores, the sweep of sparsities, and Large-Sparse, beside the dense adapter.

``--suite mrpc`` takes a small encoder and two CPU cores; ``--suite gpu`` repeats the paper's tables 1, 3 and 4 and
needs a GPU and, where no folder is given, a hub. What the arms are and why: benchmarks/sparse_arms.py. Every run
writes one JSON file and is not repeated once that is there; tables and figures are made from these files alone. The
number of an arm is the validation metric after its last epoch: no epoch is chosen by looking.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import run_missing
from benchmarks.script import CONSOLE, run, suite_options
from benchmarks.shared import ROOT, clean_environment
from benchmarks.sparse_arms import SUITES, Suite
from benchmarks.sparse_table import FIGURES, read_task, sparse_table, tasks_table, write_figures
from peft_lightning.study.tables import write_generated

__all__ = ["main", "report"]

_RESULTS = ROOT / "benchmarks" / "results"
_FOLDERS = {"mrpc": _RESULTS / "sparse", "gpu": _RESULTS / "sparse_gpu"}


def report(suite: Suite, folder: Path, places: bool) -> str:
    """Write the figures of the records in ``folder``, and the table into the documents where ``places`` says so.

    Returns the table. Raises DataError where there is no record.
    """
    records = {task: found for task in suite.tasks if (found := read_task(suite, folder, task))}
    if len(suite.tasks) > 1:
        text = tasks_table(suite, records)
        if places:
            write_generated(ROOT / "benchmarks" / "RESULTS.md", "sparse-gpu", text)
        return text
    (task,) = suite.tasks
    text = sparse_table(suite, records.get(task, {}))
    drawn = write_figures(suite, folder, records[task])
    if places:
        links = [f"![{FIGURES[path.name]}]({path.relative_to(ROOT / 'benchmarks').as_posix()})" for path in drawn]
        write_generated(ROOT / "benchmarks" / "RESULTS.md", "sparse", "\n\n".join([text, *links]))
        write_generated(ROOT / "README.md", "sparse", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write tables and figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=(__doc__ or "").split("\n")[0])
    options = suite_options(parser, SUITES, "mrpc", arguments)
    suite = SUITES[options.suite]
    tiny = ROOT / "runs" / "bench-tiny" / f"sparse-{suite.name}"
    folder: Path = options.out or (tiny if options.tiny else _FOLDERS[suite.name])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not options.report:
        environment = clean_environment(options.allow_dirty or options.tiny)
        runs = suite.runs(tiny=options.tiny, device=options.device, encoder=options.encoder)
        run_missing(runs, folder, environment, CONSOLE)
    CONSOLE.print(report(suite, folder, places=not options.tiny and options.out is None))


if __name__ == "__main__":
    run(main)
