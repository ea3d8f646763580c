"""What the data of SQuAD costs: questions a second into windows, and the share of a validation outside the model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import lightning as L
import torch
from datasets import Dataset

from benchmarks.shared import backbone, data_folder, file_digests
from benchmarks.turns import take_turns
from peft_lightning import PruneConfig, SparseAdapterModule, TaskDataModule
from peft_lightning.study.records import RunRecord
from peft_lightning.study.tables import markdown_table
from peft_lightning.tasks.table import get_task

__all__ = ["measure_squad", "squad_costs_table"]

_MAX_LENGTH, _STRIDE, _SLICE = 384, 128, 1000


class _Clock(SparseAdapterModule):
    """Counts the seconds of its forward passes."""

    inside = 0.0

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        outputs = super().forward(inputs)
        self.inside += time.perf_counter() - started
        return outputs


class _Outside(L.Callback):
    """Keeps the seconds of each validation and those of them that the model took."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []
        self._began = (0.0, 0.0)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._began = (time.perf_counter(), float(getattr(module, "inside")))  # noqa: B009

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        started, inside = self._began
        self.found.append((time.perf_counter() - started, float(getattr(module, "inside")) - inside))  # noqa: B009


def measure_squad(tiny: bool, environment: dict[str, Any]) -> RunRecord:
    """Measure, and return the record: rates in questions a second, shares and seconds."""
    started, turns = time.perf_counter(), 1 if tiny else 5
    task = "toy_span" if tiny else "squad_v1"
    results = _rates(task, tiny, turns) | _validations(task, tiny, min(turns, 3))
    return RunRecord(
        name="speed",
        status="finished",
        config={"task": task, "turns": turns, "max_length": _MAX_LENGTH, "stride": _STRIDE},
        data={"task": task, "files": {} if tiny else file_digests(data_folder() / task, "*")},
        model={},
        seeds={},
        environment=environment,
        results=results,
        seconds=time.perf_counter() - started,
    )


def squad_costs_table(record: RunRecord) -> str:
    """Return what was measured beside its goal, and the line under it."""
    results, device = record.results, record.environment["device"]
    rows = [
        _row("training questions into windows, a second", f"{results['windows']:,.0f}", "at least 2,000"),
        _row("the same with reading the file and writing the cache", f"{results['from_file']:,.0f}", ""),
        _row("the tokenizer alone", f"{results['tokenizer']:,.0f}", ""),
        _row("a validation, s", f"{results['validation']:.1f}", ""),
        _row("of it outside the model", f"{results['outside']:.1%}", "at most 15 %"),
    ]
    line = (
        f"Windows of {_MAX_LENGTH} tokens, {_STRIDE} of them shared; medians of {record.config['turns']} turns "
        f"(validations: {int(results['validations'])}). {device['name']}, {device['threads']} threads; "
        f"commit {str(record.environment['commit'])[:12]}."
    )
    return f"{markdown_table(rows)}\n\n{line}"


def _row(what: str, measured: str, goal: str) -> dict[str, str]:
    return {"what": what, "measured": measured, "goal": goal}


def _data(task: str, tiny: bool, cache: str | None = None) -> TaskDataModule:
    root = None if tiny else str(data_folder())
    tokenizer = backbone(tiny).tokenizer_name
    return TaskDataModule(
        task=task, tokenizer=tokenizer, root=root, max_length=_MAX_LENGTH, eval_batch_size=32, cache_dir=cache
    )


def _rates(task: str, tiny: bool, turns: int) -> dict[str, float]:
    """Questions a second: of the kind, of the whole way from file to cache, of the tokenizer."""
    data = _data(task, tiny)
    if tiny:
        from peft_lightning.data.toy import toy_rows

        rows: Any = toy_rows(task, "train")
        columns = {name: [row[name] for row in rows] for name in data.kind.columns(labelled=True)}
    else:
        columns = dict(Dataset.from_parquet(str(data_folder() / task / "train.parquet")).to_dict())
    question, context = get_task(task).text
    count = len(columns[question])
    slices = [
        {name: values[start : start + _SLICE] for name, values in columns.items()} for start in range(0, count, _SLICE)
    ]
    tokenizer: Any = data.tokenizer

    def windows() -> None:
        for part in slices:
            data.kind.encode(part, tokenizer, _MAX_LENGTH, labelled=True)

    def alone() -> None:
        for part in slices:
            tokenizer(
                part[question],
                part[context],
                truncation="only_second",
                max_length=_MAX_LENGTH,
                stride=_STRIDE,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )

    def from_file() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _data(task, tiny, folder).load("train")

    arms: dict[str, Callable[[], object]] = {"windows": windows, "tokenizer": alone, "from_file": from_file}
    return {name: count / median(seconds) for name, seconds in take_turns(arms, turns, warm=1).items()}


def _validations(task: str, tiny: bool, turns: int) -> dict[str, float]:
    module = _Clock(task=task, backbone=backbone(tiny, "bfloat16"), prune=PruneConfig(sparsity=0.0))
    outside = _Outside()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[outside]
    )
    data = _data(task, tiny)
    for _ in range(turns):
        trainer.validate(module, datamodule=data, verbose=False)
    total, inside = (median(column) for column in zip(*outside.found, strict=True))
    return {"validation": total, "outside": 1 - inside / total, "validations": float(turns)}
