"""Real rows of every kind train, validate, and are better scored than not: real columns, real lengths, real scorers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
from datasets import Dataset

from peft_lightning import RunCheckpoint, SparseAdapterModule, TaskDataModule, load
from peft_lightning.callbacks.report import baseline_scores
from tests.contract.kinds import reader, writer
from tests.toy import build

TASKS = (
    "copa winogrande multirc wic wsc squad_v1 squad_v2 conll2003 xsum stsb scitail snli imdb rotten_tomatoes boolq"
).split()
ROWS = {"train": 40, "validation": 40}
FEW = {"train": 16, "validation": 3}  # a search writes 128 words for each


@pytest.mark.real_data
@pytest.mark.parametrize("task", TASKS)
def test_two_steps_on_real_rows(task: str, shared_data: Path, cache_dir: Path, tmp_path: Path, encoder: str) -> None:
    rows = {
        split: Dataset.from_parquet(str(shared_data / task / f"{split}.parquet")).select(range(size))
        for split, size in (FEW if task == "xsum" else ROWS).items()
    }
    backbone = {**(writer(0.1) if task == "xsum" else reader(0.1)), "tokenizer": encoder}
    adapter = {"cross": task == "xsum"}
    module = build(SparseAdapterModule, task=task, backbone=backbone, adapter=adapter, max_length=128)
    rows["test"] = rows["validation"]
    data = TaskDataModule(task, tokenizer=encoder, rows=rows, batch_size=8, max_length=128)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        val_check_interval=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RunCheckpoint(str(tmp_path))],
    )
    trainer.fit(module, datamodule=data)
    metrics = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
    assert all(math.isfinite(metrics[name]) for name in (*module.task.metrics, "loss"))
    scores = baseline_scores(module, data, "validation")
    assert set(scores) == set(module.task.metrics) and all(-1 <= score <= 1 for score in scores.values())
    # what a person gives to have answered: no labels, no names
    given = [{name: row[name] for name in row if name not in (module.task.label, "id")} for row in rows["test"]]
    answers = load(str(tmp_path)).predict(given[:3])
    assert len(answers) == 3 and json.dumps(answers)
