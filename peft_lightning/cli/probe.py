"""``probe``: what each layer of a backbone knows of a sentence, as JSON, a table and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_lightning.atomic import atomic_write, fresh_folder
from peft_lightning.cli.parser import ToolParser
from peft_lightning.errors import UsageError

__all__ = ["run_probe"]

_LENGTH = 128


def run_probe(words: list[str]) -> None:
    """Carry out ``probe``.

    Args:
        words: the command and its options.

    Raises:
        UsageError: for wrong options.
        DataError: if a file of sentences holds a bad row.
        SystemExit: after ``--help``.
    """
    given = _parser().parse_args(words[1:])
    from peft_lightning.analysis.sentences import read_sentences

    names = [given.backbone, *given.compare]
    labels = _labels(names)
    shaded = _range(given.shade)
    if given.seed < 0:
        raise UsageError(f"seed = {given.seed}: must be at least 0")
    with fresh_folder(given.out) as folder:
        tasks = [read_sentences(path) for path in given.data.split(",") if path]
        stems = [task.name for task in tasks]
        if not stems or len(set(stems)) < len(stems):
            raise UsageError(f"data = {given.data!r}: must be files of different names")
        encoders = dict(zip(labels, _encoders(names, shaded, given), strict=True))
        report = {
            "pooling": given.pooling,
            "seed": given.seed,
            "tasks": {
                task.name: {
                    "rows": {split: len(texts) for split, texts in task.texts.items()},
                    "classes": list(task.classes),
                    "majority": task.majority,
                }
                for task in tasks
            },
            "backbones": _probe_all(encoders, tasks, pooling=given.pooling, seed=given.seed),
        }
        text = json.dumps(report, indent=2) + "\n"
        atomic_write(folder / "probe.json", lambda file: file.write(text.encode()))
        _draw(report, shaded, folder / "probe.png")
    _show(report)
    sys.stdout.write(f"wrote {given.out}\n")


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="peft-lightning probe",
        description="Fit a linear classifier on the frozen vectors of every layer of a backbone, and measure what each "
        "layer knows of a sentence.",
    )
    parser.add_argument("--backbone", required=True, help="folder or hub name; a folder with a head will do")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE[,FILE]",
        help="labelled sentences, one task a file: TSV without a header (split tr|va|te, label, text), or Parquet with "
        "columns of these names",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--compare", nargs="+", default=[], metavar="BACKBONE", help="others, measured the same way")
    parser.add_argument("--pooling", choices=("mean", "first"), default="mean", help="what stands for a sentence")
    parser.add_argument("--seed", type=int, default=42, help="of the draws behind the intervals")
    parser.add_argument(
        "--max_length", type=int, help=f"tokens of a sentence at most; {_LENGTH} unless the backbone takes less"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="sentences per forward pass")
    parser.add_argument("--shade", metavar="FIRST-LAST", help="layers that dropped tokens in pretraining, as 6-11")
    return parser


def _labels(names: Sequence[str]) -> list[str]:
    """Short names where they tell the backbones apart, else what was given."""
    if len(set(names)) < len(names):
        raise UsageError(f"compare = {' '.join(names[1:])}: must name other backbones than --backbone, each once")
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def _range(words: str | None) -> tuple[int, int] | None:
    if words is None:
        return None
    first, dash, last = words.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"shade = {words!r}: must be two numbers of layers from 1, as 6-11")
    return int(first), int(last)


def _encoders(names: Sequence[str], shaded: tuple[int, int] | None, given: argparse.Namespace) -> list[Any]:
    """All backbones, so that a wrong name is found before the first is measured."""
    import torch

    from peft_lightning.analysis.encoder import FrozenEncoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"max_length": given.max_length, "batch_size": given.batch_size, "device": device}
    encoders = [FrozenEncoder(name, **options) for name in names]
    for encoder in encoders if given.max_length is None else ():
        encoder.max_length = min(encoder.max_length, _LENGTH)
    deepest = max(encoder.depth for encoder in encoders)
    if shaded is not None and shaded[1] > deepest:
        raise UsageError(f"shade = {given.shade!r}: must end at layer {deepest}, the last, at most")
    return encoders


def _probe_all(encoders: Mapping[str, Any], tasks: Sequence[Any], *, pooling: str, seed: int) -> list[dict[str, Any]]:
    from peft_lightning.analysis.probe import gaps, probe_backbone

    entries: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for label, encoder in encoders.items():
        entry: dict[str, Any] = {"label": label, "name": encoder.name, "layers": encoder.depth, "tasks": {}}
        entry |= {"identity": encoder.identity, "max_length": encoder.max_length}
        for task in tasks:
            result, draws = probe_backbone(encoder, task, pooling=pooling, seed=seed)
            if not entries:
                first[task.name] = draws
            elif first[task.name].shape == draws.shape:
                mean = zip(result["accuracy"], entries[0]["tasks"][task.name]["accuracy"], strict=True)
                result["gap"] = {"mean": [one - other for one, other in mean], **gaps(draws, first[task.name])}
            entry["tasks"][task.name] = result
        entries.append(entry)
    return entries


def _draw(report: Mapping[str, Any], shaded: tuple[int, int] | None, path: Path) -> None:
    from peft_lightning.analysis.plots import Curve, draw_layers

    panels: dict[str, dict[str, Any]] = {}
    for name in report["tasks"]:
        panels[name] = {}
        for entry in report["backbones"]:
            result = entry["tasks"][name]
            bounds = {key: [100 * value for value in result[key]] for key in ("low", "high")}
            mean = [100 * value for value in result["accuracy"]]
            panels[name][entry["label"]] = Curve(x=range(len(mean)), mean=mean, **bounds)
    levels = {name: 100 * task["majority"] for name, task in report["tasks"].items()}
    title = "linear probes of frozen layers; bands: 95 % over draws of the test sentences"
    draw_layers(panels, levels, path, up="test accuracy, %", title=title, shaded=shaded)


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, task in report["tasks"].items():
        table = Table(title=f"{name}: {task['rows']['te']:,} test sentences, majority class {task['majority']:.3f}")
        for column in ("layer", *(entry["label"] for entry in report["backbones"])):
            table.add_column(column)
        results = [entry["tasks"][name] for entry in report["backbones"]]
        for layer in range(max(len(result["accuracy"]) for result in results)):
            table.add_row(str(layer), *(_cell(result, layer) for result in results))
        Console(soft_wrap=True, markup=False).print(table)


def _cell(result: Mapping[str, Any], layer: int) -> str:
    if layer >= len(result["accuracy"]):
        return ""
    return f"{result['accuracy'][layer]:.3f} ({result['low'][layer]:.3f} to {result['high'][layer]:.3f})"
