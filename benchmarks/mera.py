"""MerA's tables 1 to 3 and figures 1 to 3 on real data: adapters merged, tuned on few shots, beside what they replace.

``--table 1`` compares ways to use four adapters, ``2`` ways to read a task, ``3`` tracks; ``--figure`` draws from a
table's cells, and runs what is missing. What the arms are: benchmarks/mera_arms.py. Nothing is chosen by what is
reported: rates and sources come from other splits. Every cell is done once; tables and figures are made from the files
in the results' folder alone (``--report``).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.mera_arms import PLANS, Plan
from benchmarks.mera_cells import Results, read_results
from benchmarks.mera_plots import FIGURES, draw_figure
from benchmarks.mera_runs import run_plan
from benchmarks.mera_table import gains_table, scores_table, sources_table
from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, clean_environment
from peft_lightning.errors import UsageError
from peft_lightning.study.tables import write_generated

__all__ = ["main", "report"]

_RESULTS = ROOT / "benchmarks" / "results" / "mera"
_DOCUMENT = ROOT / "benchmarks" / "RESULTS.md"


def report(results: Results, plan: Plan) -> str:
    """Return the text of a plan: main table, gains, scale beside alignment, sources. Raises DataError for no cell."""
    main_arms = [arm for arm in plan.arms if arm.main]
    parts = [scores_table(results, plan, main_arms), gains_table(results, plan, main_arms)]
    if others := [arm for arm in plan.arms if not arm.main]:
        presets = dict.fromkeys(arm.preset for arm in others)
        scaled = [arm for preset in presets for arm in plan.arms if arm.preset == preset and arm.method == "mera"]
        parts += ["Scale beside alignment:", gains_table(results, replace(plan, settings=plan.fewest), scaled)]
    if results.facts["sources"]:
        parts.append(sources_table(results))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write table or figure."""
    options = _options(arguments)
    scratch = ROOT / "runs" / ("bench-tiny" if options.tiny else "bench-mera")
    folder: Path = options.out or (scratch / "results" if options.tiny else _RESULTS)
    scratch = (options.out / "runs") if options.out else scratch
    name = options.table or FIGURES[options.figure].plan
    plan = PLANS[name].tiny() if options.tiny else PLANS[name]
    places = not options.tiny and options.out is None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    path = folder / f"{'figure3' if name == 'zero' else f'table{name}'}.json"
    if not options.report:
        environment = clean_environment(options.allow_dirty or options.tiny)
        kept = folder / "sources" if places else None
        results = run_plan(
            name,
            plan,
            scratch,
            environment,
            CONSOLE,
            kept=kept,
            workers=options.workers,
            given=options.model,
            tiny=options.tiny,
        )
        results.write(path)
    results = read_results(path)
    if options.figure:
        picture = folder / f"figure{options.figure}.png"
        draw_figure(options.figure, results, plan, picture)
        text, section = (
            f"![{FIGURES[options.figure].title}](results/mera/{picture.name})",
            f"mera-figure{options.figure}",
        )
    else:
        text, section = report(results, plan), f"mera-table{name}"
    if places:
        write_generated(_DOCUMENT, section, text)
    CONSOLE.print(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mera", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=["1", "2", "3"], help="one of the paper's tables")
    what.add_argument("--figure", choices=list(FIGURES), help="one of the paper's figures")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that share them out (default: %(default)s)")
    parser.add_argument("--model", help="folder or hub name of another backbone; its results go into --out")
    parser.add_argument("--report", action="store_true", help="run nothing: table or figure from the file of cells")
    parser.add_argument("--tiny", action="store_true", help="try it in a minute: toy data, random encoder, few cells")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the file says so")
    parser.add_argument("--out", type=Path, help="folder of all that is written; the documents stay as they are")
    options = parser.parse_args(arguments)
    if options.model and not options.out:
        raise UsageError(f"--model {options.model}: give --out too, a folder of its own for another backbone")
    return options


if __name__ == "__main__":
    run(main)
