"""Prune-LoRA: what it costs and what it learns (the paper's tables 1 to 4), beside LoRA and full fine-tuning.

``--part speed`` times random encoders of two sizes; ``--part importance`` asks whether the importance is signal;
``--part learn`` trains on real tasks, one JSON file a run, and goes on where it stopped. What the arms are:
benchmarks/prune_arms.py. The number of an arm is the validation metric after its last epoch: no epoch is chosen by
looking.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.prune_arms import SUITES, Suite
from benchmarks.prune_importance import importance_table, measure_importances
from benchmarks.prune_speed import measure
from benchmarks.prune_table import accuracy_table, cost_tables, read_suite
from benchmarks.runs import run_missing
from benchmarks.script import CONSOLE, run, suite_options
from benchmarks.shared import ROOT, clean_environment
from peft_lightning.errors import UsageError
from peft_lightning.study.records import RunRecord, read_record, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main"]

_RESULTS = ROOT / "benchmarks" / "results"
_FOLDERS = {"cpu": _RESULTS / "prune", "gpu": _RESULTS / "prune_gpu"}
_DOCUMENT = ROOT / "benchmarks" / "RESULTS.md"


def _learned(suite: Suite, folder: Path, places: bool) -> str:
    """The accuracy tables, a preset each; written into the documents where ``places`` says so."""
    texts = {preset.name: accuracy_table(read_suite(suite, preset, folder)) for preset in suite.presets}
    text = "\n\n".join(texts.values() if len(texts) == 1 else [f"Preset `{n}`:\n\n{t}" for n, t in texts.items()])
    if places:
        write_generated(_DOCUMENT, "prune" if suite.name == "cpu" else "prune-gpu", text)
        if suite.name == "cpu":
            write_generated(ROOT / "README.md", "prune", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, then write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--part", choices=["speed", "importance", "learn", "all"], default="all", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--share", help="K/N: of the runs that learn each Nth from the Kth on; N processes do them all")
    options = suite_options(parser, SUITES, "cpu", arguments)
    suite, share = SUITES[options.suite], _share(options.share)
    tiny = ROOT / "runs" / "bench-tiny" / f"prune-{suite.name}"
    folder: Path = options.out or (tiny if options.tiny else _FOLDERS[suite.name])
    places = not options.tiny and options.out is None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    environment = {} if options.report else clean_environment(options.allow_dirty or options.tiny)
    torch.set_num_threads(options.threads)
    if options.part in ("speed", "all"):
        record = _once("speed", folder, options, lambda: measure(options.tiny, options.threads, environment))
        _show(cost_tables(record), "prune-speed", places)
    if options.part in ("importance", "all"):
        record = _once("importance", folder, options, lambda: measure_importances(options.tiny, environment, folder))
        _show(_with_pictures(importance_table(record), folder, places), "prune-importance", places)
    if options.part in ("learn", "all"):
        if not options.report:
            runs = suite.runs(tiny=options.tiny, device=options.device, encoder=options.encoder)
            run_missing(runs[share], folder, environment, CONSOLE)
        if options.share is None:
            CONSOLE.print(_learned(suite, folder, places))


def _share(words: str | None) -> slice:
    """Which runs are this process's."""
    if words is None:
        return slice(None)
    number, _, count = words.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--share {words}: must be K/N with K from 1 to N, such as 1/2")
    return slice(int(number) - 1, None, int(count))


def _once(part: str, folder: Path, options: argparse.Namespace, make: Callable[[], RunRecord]) -> RunRecord:
    """The record of a part; made where it is not there, or where this part is asked for by name."""
    path = folder / f"{part}.json"
    if not options.report and (options.part == part or not path.is_file()):
        write_record(path, make())
    return read_record(path)


def _show(text: str, section: str, places: bool) -> None:
    if places:
        write_generated(_DOCUMENT, section, text)
    CONSOLE.print(text)


def _with_pictures(text: str, folder: Path, places: bool) -> str:
    """The text and links to the heatmaps, from the document's place."""
    titles = {"heads-0.png": "random head", "heads-100.png": "head after 100 steps"}
    links = (
        [f"![{title}]({(folder / name).relative_to(_DOCUMENT.parent).as_posix()})" for name, title in titles.items()]
        if places
        else []
    )
    return "\n\n".join([text, *links])


if __name__ == "__main__":
    run(main)
