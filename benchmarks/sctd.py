"""Does it learn: MLM, token dropping, drop+full and SCTD, pretrained for equal seconds, then fine-tuned.

First the arms' speeds are measured in turn, which fixes how many steps each takes in the time. Then every arm is
pretrained with every seed, exported, and fine-tuned on the suite's tasks, beside the same model that was not
pretrained. Every run writes one JSON file and is not repeated once that is there with the same settings; tables and
figure are made from these files alone. ``--suite gpu`` needs a GPU. What the arms are: benchmarks/sctd_arms.py.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.runs import run_missing
from benchmarks.script import CONSOLE, run
from benchmarks.sctd_arms import ARMS, SUITES, Suite
from benchmarks.sctd_runs import calibrate, pretrain, tuning_runs
from benchmarks.sctd_table import draw, pretrain_table, read_arms, tuning_table
from benchmarks.shared import ROOT, clean_environment
from peft_lightning.errors import UsageError
from peft_lightning.study.records import RunRecord, read_record, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main", "report", "run_suite"]

_RESULTS = ROOT / "benchmarks" / "results"
_FOLDERS = {"cpu": _RESULTS / "sctd", "gpu": _RESULTS / "sctd_gpu"}
_PLACES = {"cpu": "sctd", "gpu": "sctd-gpu"}
_FIGURE = "loss.png"


def run_suite(suite: Suite, folder: Path, models: Path, environment: dict[str, Any]) -> None:
    """Do what is not on record in ``folder``: calibration, pretraining, tuning. Exported models go into ``models``."""
    base = {"suite": suite.name, "corpus": suite.corpus, "recipe": asdict(suite.recipe)}
    path = folder / "calibration.json"
    calibration = _on_record(path, base)
    if calibration is None or calibration.environment["device"] != environment["device"]:
        CONSOLE.print("calibration: the arms take turns")
        calibration = calibrate(suite, base, environment)
        write_record(path, calibration)
    steps = {arm: int(calibration.results[f"steps/{arm}"]) for arm in ARMS}
    CONSOLE.print(f"steps in {suite.recipe.budget:g} s: {steps}")
    pretrained: dict[str, RunRecord] = {}
    for seed in suite.seeds:
        for arm in ARMS:
            name, settings = f"{arm}-seed{seed}", {**base, "arm": arm, "seed": seed, "steps": steps[arm]}
            path = folder / f"pretrain-{name}.json"
            record = _on_record(path, settings)
            if record is None:
                record = pretrain(suite, arm, seed, settings, calibration, environment, models / name)
                write_record(path, record)
                found = record.results
                CONSOLE.print(
                    f"pretrain-{name}: loss {found['loss']:.3f}, unigram entropy {found['unigram_entropy']:.3f}, "
                    f"{found['steps']:.0f} steps in {found['training_seconds']:.0f} s"
                )
            else:
                CONSOLE.print(f"pretrain-{name}: on record")
            pretrained[name] = record
    run_missing(tuning_runs(suite, models, pretrained), folder, environment, CONSOLE)


def _on_record(path: Path, settings: dict[str, Any]) -> RunRecord | None:
    """Return the record of a run with exactly these settings, if there is one."""
    if not path.is_file():
        return None
    record = read_record(path)
    return record if record.config.get("run") == json.loads(json.dumps(settings)) else None


def report(suite: Suite, folder: Path, places: bool) -> str:
    """Write the figure of the records in ``folder``, and the tables into the document where ``places`` says so.

    Returns the tables. Raises DataError where there is no record.
    """
    records = read_arms(suite, folder, "pretrain")
    text = pretrain_table(suite, records)
    draw(records, folder / _FIGURE, len(suite.seeds))
    tuned = {task: found for task in suite.tasks if (found := read_arms(suite, folder, task))}
    if tuned:
        text = f"{text}\n\n{tuning_table(suite, tuned)}"
    if places:
        link = f"![Validation loss over steps and over seconds](results/{folder.name}/{_FIGURE})"
        write_generated(ROOT / "benchmarks" / "RESULTS.md", _PLACES[suite.name], f"{text}\n\n{link}")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write tables and figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sctd", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=list(SUITES), default="cpu", help="which comparison (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figure from the records")
    parser.add_argument("--tiny", action="store_true", help="try it in seconds: toy model, little text, toy tasks")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the records say so")
    parser.add_argument("--out", type=Path, help="folder of records, models and figure; the document stays as it is")
    options = parser.parse_args(arguments)
    if options.suite == "gpu" and options.device != "cuda" and not (options.tiny or options.report):
        raise UsageError(f"--device {options.device}: the suite gpu needs cuda, or --tiny")
    suite = SUITES[options.suite]
    if not options.report:
        suite = suite.on(options.device)
    if options.tiny:
        suite = suite.tiny()
    scratch = ROOT / "runs" / ("bench-tiny" if options.tiny else "bench-sctd") / f"sctd-{suite.name}"
    folder: Path = options.out or (scratch if options.tiny else _FOLDERS[suite.name])
    models = folder / "models" if options.out or options.tiny else scratch
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not options.report:
        run_suite(suite, folder, models, clean_environment(options.allow_dirty or options.tiny))
    CONSOLE.print(report(suite, folder, places=not options.tiny and options.out is None))


if __name__ == "__main__":
    run(main)
