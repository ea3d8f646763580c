"""The data module of supervised tasks."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.testing import assert_close

from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.data import supervised
from peft_lightning.data.supervised import TaskDataModule
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.kinds.base import Kind
from peft_lightning.tasks.table import TASKS, Task, get_task

TASK = Task(name="mine", labels=("bad", "good"))
ROWS = [{"text": "the cat is good", "label": 1}, {"text": "the dog", "label": "bad"}]


def module(task: str | Task = "toy_sentiment", **options: Any) -> TaskDataModule:
    """A data module with the toy tokenizer."""
    return TaskDataModule(task, **{"tokenizer": "toy", **options})


# -- what comes out


@pytest.mark.parametrize("task", ["toy_sentiment", "toy_pairs", "toy_similarity"])
def test_batches_are_the_tokenized_rows(task: str, cache_dir: Path) -> None:
    data, rows, tokenizer = module(task, batch_size=48), toy_rows(task, "validation"), toy_tokenizer()
    data.setup("validate")
    seen = []
    for batch in data.val_dataloader():
        chosen = [rows[row] for row in batch["rows"].tolist()]
        texts = [[row[column] for row in chosen] for column in get_task(task).text]
        expected = tokenizer(*texts, padding=True, return_tensors="pt")
        assert_close(dict(batch["inputs"]), dict(expected), rtol=0, atol=0)
        assert batch["labels"].tolist() == [row["label"] for row in chosen]
        assert batch["labels"].dtype == (torch.float32 if task == "toy_similarity" else torch.int64)
        seen += batch["rows"].tolist()
    assert sorted(seen) == list(range(len(rows)))


def test_stages_read_their_splits(cache_dir: Path) -> None:
    splits = ("train", "validation", "test", "predict")
    rows = {split: [{"sentence": split, "label": 0}] for split in splits}
    data = module("sst2", rows=rows)
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    loaders = (
        data.train_dataloader(),
        data.val_dataloader(),
        data.test_dataloader(),
        data.predict_dataloader(),
    )
    counts = [next(iter(loader)).keys() for loader in loaders]
    assert [("labels" in keys) for keys in counts] == [True, True, True, False]


def test_predict_needs_no_labels_and_ignores_unusable_ones(cache_dir: Path) -> None:
    for rows in ([{"text": "the cat"}], [{"text": "the cat", "label": -1}]):
        data = module(TASK, rows={"predict": rows})
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        assert set(batch) == {"inputs", "rows", "valid"}


def test_calibration_reads_the_inputs_of_any_stage_in_a_random_order(cache_dir: Path) -> None:
    rows = [{"text": " ".join(["the cat"] * (1 + number % 5))} for number in range(64)]  # not one label
    data = module(TASK, rows={"validation": rows}, batch_size=8)
    batches = list(data.calibration_dataloader("validation"))
    assert all(set(batch) == {"inputs", "rows", "valid"} for batch in batches)
    order = [row for batch in batches for row in batch["rows"].tolist()]
    assert sorted(order) == list(range(64)) and order != sorted(order)
    again = [row for batch in data.calibration_dataloader("validation") for row in batch["rows"].tolist()]
    assert order == again
    other = module(TASK, rows={"validation": rows}, batch_size=8, seed=1).calibration_dataloader("validation")
    assert order != [row for batch in other for row in batch["rows"].tolist()]
    with pytest.raises(DataError, match="column 'text': 3 is not a text"):
        module(TASK, rows={"train": [{"text": 3}]}).calibration_dataloader()


def test_labels(cache_dir: Path) -> None:
    data = module(TASK, rows={"train": ROWS})
    labels = data.labels("train")
    assert_close(labels, torch.tensor([1, 0]))
    labels += 1
    assert_close(data.labels("train"), torch.tensor([1, 0]))
    for stage in ("predict", "val"):
        with pytest.raises(DataError, match=f"the stage '{stage}' has no labels; allowed: train, validation, test"):
            data.labels(stage)


def test_long_texts_are_cut_and_sizes_differ_by_stage(cache_dir: Path) -> None:
    rows = [{"text": "cat " * 50, "label": 0}] * 7
    data = module(TASK, rows={"train": rows, "validation": rows}, max_length=9, batch_size=2, eval_batch_size=5)
    data.setup("fit")
    train, validation = list(data.train_dataloader()), list(data.val_dataloader())
    assert [len(batch["rows"]) for batch in train] == [2, 2, 2, 1]
    assert [len(batch["rows"]) for batch in validation] == [5, 2]
    assert {batch["inputs"]["input_ids"].shape[1] for batch in train} == {9}


def test_many_rows_keep_their_order(cache_dir: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "cat " * (row % 11 + 1), "label": row % 2} for row in range(2345)]
    data = module(TASK, rows={"train": rows})
    encoded = [len(row["text"].split()) + 2 for row in rows]
    assert data.labels("train").tolist() == [row["label"] for row in rows]
    for batch in data.train_dataloader():
        lengths = batch["inputs"]["attention_mask"].sum(1)
        assert lengths.tolist() == [encoded[row] for row in batch["rows"].tolist()]


def test_seed_changes_the_order(cache_dir: Path) -> None:
    orders = []
    for seed in (1, 1, 2):
        loader = module(seed=seed).train_dataloader()
        orders.append([row for batch in loader for row in batch["rows"].tolist()])
    assert orders[0] == orders[1] != orders[2]


# -- the cache


@pytest.fixture
def tokenizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grow by one number, of rows, whenever rows are tokenized."""
    counted: list[int] = []
    encode = Kind.encode

    def counting(self: Kind, rows: Any, *arguments: Any, **options: Any) -> Any:
        counted.append(len(rows[self.task.text[0]]))
        return encode(self, rows, *arguments, **options)

    monkeypatch.setattr(Kind, "encode", counting)
    return counted


def test_a_split_is_tokenized_once(cache_dir: Path, tokenizations: list[int]) -> None:
    for _ in range(2):
        data = module(TASK, rows={"train": ROWS})
        data.labels("train")
        # Calls leave their settings behind in the tokenizer, which must not look like another tokenizer.
        toy_tokenizer()("the cat", padding="max_length", truncation=True, max_length=5)
    assert tokenizations == [2]
    assert len(list(cache_dir.glob("*.arrow"))) == 1


def changed_tokenizer() -> Any:
    """The toy tokenizer with one more word."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["weasel"])
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 9},
        {"rows": {"train": [*ROWS, {"text": "the fish", "label": 0}]}},
        {"tokenizer": changed_tokenizer()},
        {"task": Task(name="mine", labels=("bad", "good", "fair"))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_result_changes_the_key(
    cache_dir: Path, tokenizations: list[int], change: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"task": TASK, "rows": {"train": ROWS}, "tokenizer": "toy"}
    TaskDataModule(**options).labels("train")
    TaskDataModule(**{**options, **change}).labels("train")
    assert len(tokenizations) == 2


def test_a_changed_kind_changes_the_key(
    cache_dir: Path, tokenizations: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its module holds may take part in encoding; a class from a console has no file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "from peft_lightning.tasks.kinds.classify import Classify\n\nclass Outside(Classify):\n    pass\n"
    path = tmp_path / "a_kind_from_outside.py"
    task = dataclasses.replace(TASK, kind="a_kind_from_outside.Outside")
    for more in ("", "HELPER = 1\n", "HELPER = 1\n"):
        path.write_text(text + more)
        importlib.import_module("a_kind_from_outside")  # its user has to, before a task may name it
        module(task, rows={"train": ROWS}).labels("train")
    assert len(tokenizations) == 2
    monkeypatch.setattr(sys.modules["a_kind_from_outside"].Outside, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    for _ in range(2):
        module(task, rows={"train": ROWS}).labels("train")
    assert len(tokenizations) == 3


def test_labelled_and_unlabelled_rows_have_different_keys(cache_dir: Path, tokenizations: list[int]) -> None:
    data = module(TASK, rows={"test": ROWS})
    data.setup("predict")
    data.setup("test")
    assert len(tokenizations) == 2
    assert "labels" in next(iter(data.test_dataloader()))


def test_cache_dir_comes_before_the_environment(cache_dir: Path, tmp_path: Path) -> None:
    module(TASK, rows={"train": ROWS}, cache_dir=str(tmp_path / "own")).labels("train")
    assert not list(cache_dir.iterdir())
    assert len(list((tmp_path / "own").glob("*.arrow"))) == 1


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "nope"}, "task is 'nope'; allowed: cola"),
        ({"batch_size": 0}, "batch_size is 0; allowed: at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; allowed: at least 1"),
        ({"max_length": 7}, "max_length is 7; allowed: at least 8"),
        ({"seed": -1}, "seed is -1; allowed: at least 0"),
        ({"workers": -1}, "workers is -1; allowed: at least 0"),
        ({"rows": ROWS}, "rows is a list; allowed: a mapping from splits to their rows"),
        ({"batch_size": True}, "batch_size is True; allowed: a whole number, at least 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0; allowed: a whole number, at least 1"),
        ({"eval_batch_size": "8"}, "eval_batch_size is '8'; allowed: a whole number, at least 1"),
        ({"seed": 1.5}, "seed is 1.5; allowed: a whole number, at least 0"),
        ({"workers": False}, "workers is False; allowed: a whole number, at least 0"),
        ({"max_length": "32"}, "max_length is '32'; allowed: a whole number, at least 8"),
        ({"root": 5}, "root is 5; allowed: a folder that exists, or null"),
        ({"splits": "dev"}, "splits is 'dev'; allowed: a mapping from stages to splits, or null"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "label": 0}, r"rows\['train'\]: row 2, column 'text': None is not a text"),
        ({"text": 3, "label": 0}, r"rows\['train'\]: row 2, column 'text': 3 is not a text"),
        ({"label": 0}, r"rows\['train'\]: row 2, column 'text': None is not a text"),
        (
            {"text": "a", "label": 2},
            r"row 2, column 'label': the label is 2; allowed: 0 to 1, or one of bad, good",
        ),
        ({"text": "a", "label": "fair"}, r"row 2, column 'label': the label is 'fair'; allowed: 0 to 1"),
    ],
)
def test_wrong_rows_name_place_and_row(cache_dir: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        module(TASK, rows={"train": [*ROWS, row]}).labels("train")
    assert not list(cache_dir.glob("*.arrow"))


def test_row_numbers_count_over_the_whole_split(cache_dir: Path) -> None:
    rows = [*(ROWS * 600), {"text": "cat", "label": 9}]
    with pytest.raises(DataError, match=r"row 1200, column 'label': the label is 9"):
        module(TASK, rows={"train": rows}).labels("train")


def test_wrong_row_of_a_file_names_the_file(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\ncat,0\ndog,\n")
    with pytest.raises(DataError, match=r"train.csv: row 1, column 'label': the label is ''; allowed: 0 to 1"):
        module(TASK, root=str(tmp_path)).labels("train")


def test_row_without_tokens(cache_dir: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"cat": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="?")
    data = module(TASK, rows={"train": [{"text": "cat", "label": 0}, {"text": "", "label": 0}]}, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"rows\['train'\]: row 1 has no tokens; allowed: at least one"):
        data.labels("train")


def test_tokenizer_without_padding_token() -> None:
    tokenizer = changed_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match=r"tokenizer '.*' has no padding token; allowed: one that has"):
        _ = module(tokenizer=tokenizer).tokenizer


def test_max_length_beyond_the_tokenizer() -> None:
    with pytest.raises(UsageError, match="max_length is 1024; allowed with this tokenizer: at most 512"):
        _ = module(max_length=1024).tokenizer


@pytest.mark.parametrize("tokenizer", [None, 5])
def test_no_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=f"tokenizer is {tokenizer}; allowed: a folder, a hub name, toy, or a tok"):
        _ = module(tokenizer=tokenizer).tokenizer


# -- with Lightning


class Reader(L.LightningModule):
    """A module that notes the rows it is given."""

    tokenizer_name = "toy"

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.read.append((self.current_epoch, batch["rows"].tolist()))
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch["rows"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, ckpt_path: str | None = None, **options: Any) -> Reader:
    """Train two epochs of five batches; save after the third step of each epoch."""
    reader = Reader()
    rows = [{"text": "cat " * (row % 5 + 1), "label": 0} for row in range(18)]
    data = TaskDataModule(TASK, rows={"train": rows, "validation": rows}, batch_size=4)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[checkpoint],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(reader, data, ckpt_path=ckpt_path, weights_only=True)
    return reader


@pytest.mark.filterwarnings("ignore")
def test_trainer_reads_all_rows_and_continues_within_an_epoch(cache_dir: Path, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", num_sanity_val_steps=0)
    for epoch in (0, 1):
        assert sorted(row for e, rows in whole.read if e == epoch for row in rows) == list(range(18))
    assert sorted(whole.validated) == sorted(2 * [*range(18)])
    for step in (3, 6, 9):
        rest = fit(tmp_path / "rest", ckpt_path=str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert rest.read == whole.read[step:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "^seed is 7, was 42; allowed to go on"),
        ({"max_length": 8}, "^the rows as they are encoded: not the same; allowed to go on"),
        ({"rows": {"train": [*ROWS, *ROWS[::-1]]}}, "^the rows as they are encoded: not the same; allowed to go on"),
    ],
)
def test_other_data_are_refused_in_any_epoch(cache_dir: Path, changes: dict[str, Any], message: str) -> None:
    rows = [{"text": f"{text} cat cat cat cat cat cat", "label": 0} for text in ("the", "a", "his", "dog")]
    options: dict[str, Any] = {"rows": {"train": rows, "validation": ROWS}, "batch_size": 2}
    first = module(TASK, **options).train_dataloader()
    next(iter(first))
    for position in (0, 1):
        state = {**first.state_dict(), "position": position}
        with pytest.raises(UsageError, match=message):
            module(TASK, **{**options, **changes}).train_dataloader().load_state_dict(state)
        module(TASK, **options, workers=1, eval_batch_size=1).train_dataloader().load_state_dict(state)
        del state["stream"]
        module(TASK, **{**options, **changes}).train_dataloader().load_state_dict(state)
    # A fit that validates goes on with the same validation; evaluation alone may read whatever it likes.
    fits = [module(TASK, rows={"train": rows, "validation": held_out}) for held_out in (ROWS, ROWS, ROWS[::-1])]
    for fit in fits:
        fit.setup("fit")
    state = fits[0].train_dataloader().state_dict()
    fits[1].train_dataloader().load_state_dict(state)
    with pytest.raises(UsageError, match="^the rows to validate on, as they are encoded: not the same; allowed to go"):
        fits[2].train_dataloader().load_state_dict(state)
    assert module(TASK, **options).val_dataloader().state_dict()["stream"] == {}


@pytest.mark.filterwarnings("ignore")
def test_validation_split_is_not_needed_where_nothing_is_validated(cache_dir: Path, tmp_path: Path) -> None:
    data = TaskDataModule(TASK, rows={"train": ROWS})
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_epochs=1, limit_val_batches=0, accelerator="cpu", **options).fit(Reader(), data)
    with pytest.raises(DataError, match=r"rows has no split 'validation' \(stage validation\); there are: train"):
        L.Trainer(max_epochs=1, accelerator="cpu", **options).fit(Reader(), data)


def test_rank_comes_from_the_trainer(cache_dir: Path) -> None:
    seen = []
    for rank in (0, 1):
        data = module(rows={"train": ROWS, "validation": [*ROWS, ROWS[0]]}, task=TASK, batch_size=1)
        trainer: Any = SimpleNamespace(
            world_size=2,
            global_rank=rank,
            current_epoch=0,
            limit_val_batches=1.0,
            state=SimpleNamespace(fn=None),
        )
        data.trainer = trainer
        data.prepare_data()
        batches = list(data.val_dataloader())
        assert [len(data.train_dataloader()), len(batches)] == [1, 2]
        seen += [row for batch in batches for row in batch["rows"][batch["valid"]].tolist()]
    assert sorted(seen) == [0, 1, 2]


def test_command_line_reads_a_task_by_name_or_in_full() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TaskDataModule, "data")
    spelled = "--data.task={name: mine, text: [a, b], labels: [x, y], splits: {validation: dev}}"
    for option, expected in [
        ("--data.task=cb", TASKS["cb"]),
        (spelled, Task(name="mine", text=("a", "b"), labels=("x", "y"), splits={"validation": "dev"})),
    ]:
        config = parser.parse_args(["--data=peft_lightning.data.supervised.TaskDataModule", option])
        data = parser.instantiate(config).data
        assert isinstance(data, supervised.TaskDataModule)
        assert data.task == expected


def test_rows_without_a_label_are_left_out(cache_dir: Path) -> None:
    task = Task(labels=("bad", "good"), unlabelled=("-1",))
    rows = [
        {"text": text, "label": label} for text, label in zip(("a", "the", "cat", "dog"), (1, -1, 0, -1), strict=True)
    ]
    data = module(task, rows={"train": rows, "test": rows})
    assert data.labels("train").tolist() == [1, 0]
    assert len(data.load("predict")) == 4  # all are answered
    with pytest.raises(DataError, match="has no row with a label; allowed: at least one"):
        module(task, rows={"train": rows[1:2]}).labels("train")
    with pytest.raises(DataError, match="row 3, column 'label': the label is 7"):
        module(task, rows={"train": [*rows[:3], {"text": "a", "label": 7}]}).labels("train")


def test_rows_without_tags_are_left_out_whatever_their_length(cache_dir: Path) -> None:
    task = Task(kind="tags", text=("words",), labels=("O", "B-A"), metrics=("f1",), unlabelled=("None",))
    words = (["the", "cat"], ["dog"], ["a", "red", "fish"])
    rows = [{"words": part, "label": tags} for part, tags in zip(words, ([0, 1], None, [0, 0, 1]), strict=True)]
    assert module(task, rows={"train": rows}).labels("train").shape == (2, 5)  # with [CLS] and [SEP]
    with pytest.raises(DataError, match="row 2, column 'label': 1 tags for 3 words"):
        module(task, rows={"train": [*rows[:2], {**rows[2], "label": [0]}]}).labels("train")


# -- speed and real data


def test_loading_costs_less_than_two_percent_of_a_step(cache_dir: Path) -> None:
    rows = [{"text": "cat " * 62, "label": 0}] * 640
    loader = module(TASK, rows={"train": rows}).train_dataloader()
    seconds, started = [], time.perf_counter()
    for _ in loader:
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    # A step of the smallest real encoder takes 400 ms with such a batch.
    assert sorted(seconds)[len(seconds) // 2] < 0.02 * 0.4


_NOT_HERE = {"mnli_mm", "ontonotes", "hellaswag", "sick", "paws", "yelp_polarity", "anli_r1", "anli_r2", "anli_r3"}


@pytest.mark.real_data
@pytest.mark.parametrize("task", [name for name in TASKS if not name.startswith("toy_") and name not in _NOT_HERE])
def test_real_tasks_can_be_read(task: str, shared_data: Path, cache_dir: Path, encoder: str) -> None:
    data = TaskDataModule(task, tokenizer=encoder, root=str(shared_data))
    labels = data.labels("validation")
    rows = torch.cat([batch["rows"] for batch in data.val_dataloader()])
    assert rows.sort().values.tolist() == list(range(len(labels)))
    expected = {"mrpc": 408, "stsb": 1500, "cb": 56, "mnli": 9815}
    assert len(labels) == expected.get(task, len(labels))
    assert task != "mrpc" or labels.float().mean().item() == pytest.approx(0.684, abs=1e-3)
