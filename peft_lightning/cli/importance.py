"""``importance``: how much the heads of a backbone matter to one task or several, as files, a table and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from peft_lightning.atomic import atomic_write, fresh_folder
from peft_lightning.cli.parser import ToolParser
from peft_lightning.errors import UsageError

__all__ = ["run_importance"]


def run_importance(words: list[str]) -> None:
    """Carry out ``importance``.

    Args:
        words: the command and its options.

    Raises:
        UsageError: for wrong options, or a backbone whose heads are not known.
        DataError: if a task's training data cannot be used.
        DegenerateScoreError: if what was measured ranks nothing.
        SystemExit: after ``--help``.
    """
    given = _parser().parse_args(words[1:])
    given.task, given.seeds = _tasks(given.task), _seeds(given.seeds)
    if given.data is not None and not Path(given.data).is_dir():
        raise UsageError(f"data = {given.data}: there is no such folder")
    with fresh_folder(given.out) as folder:
        from peft_lightning.analysis.importance import importance_report, mean_importance, verdicts
        from peft_lightning.files.importance import write_importance
        from peft_lightning.layers.prune_config import ImportanceConfig

        names = ("batches", "norm", "blocks", "classifier_steps")
        settings = ImportanceConfig(**{name: getattr(given, name) for name in names})
        measured, sites, identity = _measure(settings, given)
        how = {name: getattr(given, name) for name in (*names, "lr", "seeds", "batch_size", "max_length")}
        for task, by_seed in measured.items():
            mean = mean_importance(list(by_seed.values()))
            write_importance(folder / f"{task}.json", mean, identity, {"task": task, **how})
        report = importance_report(measured, sites, settings)
        report = {"name": given.backbone, "backbone": identity, **how, **report, "verdicts": verdicts(report)}
        text = json.dumps(report, indent=2) + "\n"
        atomic_write(folder / "report.json", lambda file: file.write(text.encode()))
        _draw(report, folder / "heads.png")
    _show(report)
    sys.stdout.write(f"wrote {given.out}\n")


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="peft-lightning importance",
        description="Measure how much each attention head of a frozen backbone matters to a task, and whether that is "
        "signal or noise. --model.importance.file FOLDER prunes by it; pruning neurons needs --neurons, ranks by the "
        "blocks' own gates --blocks gate.",
    )
    parser.add_argument("--backbone", required=True, help="folder or hub name; a folder with a head will do")
    parser.add_argument("--task", required=True, metavar="TASK[,TASK]", help="names of rows of the task table")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--data", metavar="FOLDER", help="holds the tasks' folders; the hub if left out")
    parser.add_argument("--tokenizer", help="folder or hub name, if it is not the backbone's own")
    parser.add_argument("--batches", type=int, default=10, help="batches of training data, for each seed")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a batch")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a row at most")
    parser.add_argument("--norm", default="layer", help="layer (within each attention) or all (over all heads)")
    parser.add_argument(
        "--blocks",
        default="normalised",
        help="a block's importance: normalised (mean of its heads'), raw (their sum before that) or gate (its own)",
    )
    parser.add_argument("--neurons", action="store_true", help="measure the feed-forward blocks' neurons as well")
    parser.add_argument(
        "--classifier_steps",
        type=int,
        default=0,
        help="steps on the classifier alone before measuring, which otherwise is a random one",
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="rate of these steps")
    parser.add_argument(
        "--seeds",
        default="42",
        metavar="SEED[,SEED]",
        help="of the classifier's start and of the rows; from two on, it is known what is noise",
    )
    return parser


def _tasks(words: str) -> list[str]:
    names = words.split(",")
    if len(set(names)) < len(names):
        raise UsageError(f"task = {words!r}: must name each task once")
    return names


def _seeds(words: str) -> list[int]:
    parts = words.split(",")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(set(numbers)) < len(parts) or not all(number < 2**63 for number in numbers):
        raise UsageError(f"seeds = {words!r}: must be whole numbers from 0 to 2**63 - 1, each once, as 42,43")
    return numbers


def _measure(settings: Any, given: argparse.Namespace) -> tuple[dict[str, dict[int, Any]], Any, dict[str, Any]]:
    """Importance by task and seed, the backbone's attentions, and its fingerprint.

    What can be wrong is found before the first measurement.
    """
    import torch

    from peft_lightning.data.supervised import TaskDataModule
    from peft_lightning.layers.pruned_heads import attention_sites

    options = {"tokenizer": given.tokenizer or given.backbone, "root": given.data}
    sizes = {"batch_size": given.batch_size, "max_length": given.max_length}
    sources: dict[str, Any] = {task: TaskDataModule(task=task, **options, **sizes) for task in given.task}
    whole = _module(given.task[0], given.seeds[0], settings, given)
    sites = attention_sites(whole.backbone)
    for source in sources.values():
        _check_fit(whole, source)
        source.load("train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured: dict[str, dict[int, Any]] = {task: {} for task in given.task}
    for task, source in sources.items():
        for seed in given.seeds:
            module = _module(task, seed, settings, given).to(device)
            source.seed = seed  # other rows, or the same in another order
            batches = islice(source.train_dataloader(), settings.batches)
            on_device = [module.transfer_batch_to_device(batch, device, 0) for batch in batches]
            measured[task][seed] = module.measure(on_device)
    return measured, sites, whole.backbone_fingerprint


def _module(task: str, seed: int, settings: Any, given: argparse.Namespace) -> Any:
    """A module with the whole backbone."""
    from peft_lightning.layers.prune_config import StructureConfig
    from peft_lightning.methods import PruneLoRAModule
    from peft_lightning.settings import OptimConfig

    module = PruneLoRAModule(
        task=task,
        backbone={"name": given.backbone, "tokenizer": given.tokenizer},  # type: ignore[arg-type]
        importance=settings,
        prune=StructureConfig(ffn_to_prune=int(given.neurons)),  # asks for neurons' importance; nothing is pruned here
        optim=OptimConfig(lr=given.lr),
        max_length=given.max_length,
        seed=seed,
    )
    module.configure_model()
    return module


def _check_fit(module: Any, source: Any) -> None:
    """Refuse tokens that the backbone does not embed, or more than it has positions for."""
    words, most = module.backbone.config.vocab_size, module.positions()
    if len(source.tokenizer) > words:
        raise UsageError(
            f"tokenizer = {module.tokenizer_name!r}: has {len(source.tokenizer)} words, the backbone embeds {words}"
        )
    if most is not None and source.max_length > most:
        raise UsageError(f"max_length = {source.max_length}: the backbone has {most} positions")


def _draw(report: Mapping[str, Any], path: Path) -> None:
    from peft_lightning.analysis.heatmap import draw_heads

    panels = {}
    for name, task in report["tasks"].items():
        between = task["between_seeds"]
        seen = "one seed" if between is None else f"between seeds {between['mean']:.2f}"
        panels[f"{name}\nrank correlation: {seen}"] = task["heads"]
    draw_heads(panels, path, title=f"importance of heads, {Path(report['name']).name}")


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from peft_lightning.analysis.heatmap import short_labels

    tasks = report["tasks"]
    table = Table(title=f"importance of blocks ({report['blocks']}), place in brackets")
    for column in ("block", *(f"{name}, {task['examples']:,} examples" for name, task in tasks.items())):
        table.add_column(column)
    paths = list(next(iter(tasks.values()))["blocks"])
    cells = [_cells(list(task["blocks"].values())) for task in tasks.values()]
    for label, *row in zip(short_labels(paths), *cells, strict=True):
        table.add_row(label, *row)
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    for line in report["verdicts"]:
        console.print(line)


def _cells(scores: Sequence[float]) -> list[str]:
    places = {number: place for place, number in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1)}
    return [f"{score:.3g} ({places[number]})" for number, score in enumerate(scores)]
