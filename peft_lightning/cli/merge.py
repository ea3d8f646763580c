"""``merge``: several pretrained adapters become one, with its recipe, a report by layer, and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lightning.cli.parser import ToolParser, plain_notes
from peft_lightning.errors import DataError, UsageError

__all__ = ["run_merge"]

_EPILOG = """presets:
  sum, avg    both matrices added (MerA, equation 1), or averaged (equation 2)
  wts         neurons matched to the first adapter's by their weights, then averaged; no data
  acts        the same by their activations on unlabelled inputs (--data or --texts)
  acts+       the same, with balanced scales, matched to the adapter that is most like the others, and the up
              projections fitted to the mean of the adapters' outputs
  select      of all adapters' neurons those of largest output, fitted to the sum of the adapters' outputs
  cat, svd, ties, dare   for LoRA: all ranks side by side (weighted sum or mean, exactly), or cut to one rank (--rank)

stages for --set, each with what there is besides the preset's:
  align=none|weights|activations   features=down|all   metric=euclidean|squared|inner   balance=true|false
  solver=assignment|emd|sinkhorn   marginals=uniform|importance   regularisation=0.01   reference=first|medoid|0|NAME
  combine=sum|average|ties|regmean|select   density=0.2   shrink=0.9   choice=energy|gain   width=48
  repair=none|refit   ridge=0.001   masks=union|budget   budget=10000          LoRA: density=0.2   seed=0

examples:
  peft-lightning merge --adapters hub/imdb hub/qnli --preset wts --backbone bert-base-uncased --output merged
  peft-lightning merge --adapters hub/imdb runs/qnli --backbone bert-base-uncased \\
      --data mrpc --set ridge=0.01 --scale sum --output merged
"""


def run_merge(words: list[str]) -> None:
    """Carry out ``merge``.

    Args:
        words: the command and its options.

    Raises:
        UsageError: for wrong options, or adapters that cannot become one.
        CheckpointError: if an adapter cannot be read, or belongs to another backbone.
        DataError: if the data cannot be used.
        SystemExit: after ``--help``.
    """
    given = _parser().parse_args(words[1:])
    merge = _settings(given)
    from peft_lightning.exchange import merge_adapters

    with plain_notes():
        record = merge_adapters(
            given.adapters,
            given.output,
            backbone={"name": given.backbone, "tokenizer": given.tokenizer, "dtype": given.dtype},
            merge=merge,
            data=_data(given),
            split=given.data_split,
            batch_size=given.batch_size,
            max_length=given.max_length,
            format=given.format,
            task=given.task,
            head=given.head,
            allow_bin=given.allow_bin,
        )
    _show(record)
    sys.stdout.write(f"wrote {given.output}\n")


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="peft-lightning merge",
        description="Merge pretrained adapters of one backbone into one: bottleneck adapters by matching their "
        "neurons (MerA), LoRA\nby adding its updates. Writes the adapter, merge.json (recipe, hashes of the adapters, "
        "figures of every site) and\nmerge.png.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is merged")
    what.add_argument(
        "--adapters",
        nargs="+",
        action="extend",
        required=True,
        metavar="FOLDER",
        help="of AdapterHub's library or PEFT (LoRA), or our own: exported adapters, runs, checkpoints",
    )
    what.add_argument("--backbone", required=True, help="folder or hub name of the model the adapters were made for")
    what.add_argument("--dtype", default="float32", help="what the backbone is held in: float32 or bfloat16")
    what.add_argument("--allow_bin", action="store_true", help="read pickled tensors (.bin), and nothing but tensors")
    how = parser.add_argument_group("how")
    how.add_argument("--preset", default="select", help="one of the presets below (default: %(default)s)")
    how.add_argument(
        "--weights", nargs="+", action="extend", type=float, metavar="W", help="one for each adapter, of either sign"
    )
    how.add_argument(
        "--scale",
        help="what the output stands for: mean, sum, or a factor of the mean; "
        "if left out the preset's own, of LoRA the sum where weights are given, else the mean",
    )
    how.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="STAGE=VALUE",
        help="stages unlike the preset's, see below",
    )
    how.add_argument("--rank", type=int, help="LoRA: rank of the result (svd, ties, dare)")
    _add_data(parser)
    _add_output(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("unlabelled inputs, for activations and for output errors in the report")
    data.add_argument("--data", metavar="TASK", help="name of a row of the task table")
    data.add_argument("--texts", metavar="FILE", help="or a file with a text a line")
    data.add_argument("--data_root", metavar="FOLDER", help="holds the task's folder; the hub if left out")
    data.add_argument("--data_split", default="train", help="train, validation or test (default: %(default)s)")
    data.add_argument("--tokenizer", help="folder or hub name, if it is not the backbone's own")
    data.add_argument("--batch_size", type=int, default=8, help="rows of a batch, for each adapter")
    data.add_argument("--max_length", type=int, default=128, help="tokens of a row at most")
    data.add_argument("--tokens", type=int, default=2048, help="tokens that are read at least (default: %(default)s)")
    data.add_argument(
        "--streams",
        default="own",
        help="own (each adapter on its own forward pass) or shared (all on the bare backbone's, which is faster)",
    )


def _add_output(parser: ToolParser) -> None:
    out = parser.add_argument_group("what is written")
    out.add_argument("--output", "--out", required=True, metavar="FOLDER", help="a new folder")
    out.add_argument("--format", help="adapterhub, peft or peft_lightning; what fits if left out")
    out.add_argument("--task", help="of the new head that an adapter in our own format has")
    out.add_argument("--head", metavar="NAME", help="adapter whose head goes along; heads stay behind if left out")


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``MergeConfig``."""
    recipe: dict[str, Any] = {}
    for word in given.set:
        name, equals, value = word.partition("=")
        if not name or not equals or name in recipe:
            raise UsageError(f"set = {word!r}: must be a stage and its value, each stage once, as reference=medoid")
        recipe[name] = _plain(value)
    if given.rank is not None:
        recipe["rank"] = given.rank
    scale = None if given.scale is None else _plain(given.scale)
    names = ("preset", "weights", "tokens", "streams")
    return {**{name: getattr(given, name) for name in names}, "scale": scale, "recipe": recipe}


def _plain(word: str) -> Any:
    """A number, true, false, null or quoted text where the word is one, else the word."""
    try:
        value = json.loads(word)
    except ValueError:
        return word
    return value if isinstance(value, int | float | str | None) else word


def _data(given: argparse.Namespace) -> Any:
    """What the activations come from, or None."""
    if given.data is not None and given.texts is not None:
        raise UsageError(f"data = {given.data}, texts = {given.texts}: give one of them")
    if given.texts is not None:
        return _lines(Path(given.texts))
    if given.data is None:
        return None
    if given.data_root is not None and not Path(given.data_root).is_dir():
        raise UsageError(f"data_root = {given.data_root}: there is no such folder")
    if given.data_split not in ("train", "validation", "test"):
        raise UsageError(f"data_split = {given.data_split!r}: must be train, validation or test")
    from peft_lightning.data.supervised import TaskDataModule

    return TaskDataModule(
        task=given.data,
        tokenizer=given.tokenizer or given.backbone,
        root=given.data_root,
        batch_size=given.batch_size,
        max_length=given.max_length,
    )


def _lines(path: Path) -> list[str]:
    from peft_lightning.reading.limits import read_bytes

    try:
        lines = [line.strip() for line in read_bytes(path).decode("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    if not any(lines):
        raise DataError(f"{path}: holds no text")
    return [line for line in lines if line]


def _show(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from peft_lightning.analysis.merging import site_figure

    report = {**record, "sources": [source["name"] for source in record["sources"]]}
    read = f", {record['streams']} streams, {record['tokens']:,} tokens" if record["tokens"] else ""
    columns = {"cosine": "cosine", "norm_ratio": "norm ratio", "output_error": "error, mean", "lost": "lost"}
    columns["scaled_output_error"] = "error, scaled"
    cells = {name: [site_figure(report, site, name) for site in record["sites"]] for name in columns}
    if cells["scaled_output_error"] == cells["output_error"]:
        del cells["scaled_output_error"]
    shown = {columns[name]: values for name, values in cells.items() if any(values)}
    factors = ", ".join(f"{factor:.3g}" for factor in record["outputs"])
    table = Table(title=f"{record['preset']} of {len(report['sources'])} adapters, output factors {factors}{read}")
    for column in ("site", *shown):
        table.add_column(column)
    for row, site in enumerate(record["sites"]):
        found = [values[row] for values in shown.values()]
        table.add_row(site, *(f"{sum(values) / len(values):.3f}" if values else "" for values in found))
    Console(soft_wrap=True, markup=False).print(table)
