"""The data module of pretraining."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from peft_lightning.backbones.tokenizers import same_tokens
from peft_lightning.backbones.toy import TOY_WORDS, toy_tokenizer
from peft_lightning.data import corpus, documents
from peft_lightning.data.corpus import MLMDataModule
from peft_lightning.data.loader import Loader
from peft_lightning.data.vocabulary import read_vocabulary
from peft_lightning.errors import DataError, UsageError
from tests.reference.corpus import blocks_of

WORDS = [word for words in TOY_WORDS.values() for word in words]
VOCABULARY = read_vocabulary(toy_tokenizer())
NAMES = ("input_ids", "targets", "labels", "noise")


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of three to 30 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 31))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path, cache_dir: Path) -> Path:
    """Return a folder with documents for training, validation and test."""
    made = tmp_path / "texts"
    made.mkdir()
    for seed, (split, count) in enumerate([("train", 70), ("validation", 25), ("test", 12)]):
        (made / f"{split}.txt").write_text("\n\n".join(texts(count, seed)))
    return made


def module(folder: Path | None, **options: Any) -> MLMDataModule:
    """A data module with the toy tokenizer and small blocks."""
    inputs = None if folder is None else str(folder)
    return MLMDataModule(**{"inputs": inputs, "tokenizer": "toy", "block_size": 16, "batch_size": 4, **options})


def on_rank(data: MLMDataModule, rank: int = 0, world: int = 1, epoch: int = 0, **more: Any) -> MLMDataModule:
    """The same, with a trainer."""
    state, fitted = SimpleNamespace(fn=None), SimpleNamespace(tokenizer_name=None)
    trainer: Any = SimpleNamespace(
        **{
            "world_size": world,
            "global_rank": rank,
            "current_epoch": epoch,
            "limit_val_batches": 1.0,
            "state": state,
            "lightning_module": fitted,
            **more,
        }
    )
    data.trainer = trainer
    return data


def steps_of(loaders: list[Loader]) -> list[dict[str, Tensor]]:
    """The global batches, rows in their places, of the loaders of all ranks; only rows that count."""
    steps = []
    for batches in zip(*loaders, strict=True):
        step = {name: torch.stack([batch[name] for batch in batches], 1).flatten(0, 1) for name in batches[0]}
        steps.append({name: values[step["valid"]] for name, values in step.items()})
    return steps


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    """Whether two lists of batches are bit-equal."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


# -- what comes out


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_batches_are_the_corrupted_blocks(folder: Path, stage: str) -> None:
    data = module(folder)
    data.setup(stage)
    loader, split = {
        "fit": (data.train_dataloader, "train"),
        "validate": (data.val_dataloader, "validation"),
        "test": (data.test_dataloader, "test"),
    }[stage]
    contents = (folder / f"{split}.txt").read_text().split("\n\n")
    expected = torch.tensor(blocks_of(contents, toy_tokenizer(), 16))
    seen = []
    for batch in loader():
        assert {name: (tuple(values.shape), values.dtype) for name, values in batch.items()} == {
            "input_ids": ((4, 16), torch.int64),
            "targets": ((4, 2), torch.int64),
            "labels": ((4, 2), torch.int64),
            "noise": ((4, 16), torch.float32),
            "rows": ((4,), torch.int64),
            "valid": ((4,), torch.bool),
        }
        restored = batch["input_ids"].scatter(1, batch["targets"], batch["labels"])
        assert torch.equal(restored, expected[batch["rows"]])
        assert VOCABULARY.ordinary_V[batch["labels"].numpy()].all()
        seen += batch["rows"][batch["valid"]].tolist()
    if stage == "fit":
        assert len(seen) == len({*seen}) == len(expected) // 4 * 4
    else:
        assert sorted(seen) == list(range(len(expected)))
    assert data.targets == 2 and data.vocabulary == len(toy_tokenizer()) and data.mask_rate == 0.15


@pytest.mark.parametrize(
    ("rate", "size", "targets"), [(0.15, 128, 19), (0.15, 512, 77), (0.01, 16, 1), (0.3, 64, 19), (0.5, 16, 8)]
)
def test_number_of_targets(folder: Path, rate: float, size: int, targets: int) -> None:
    (folder / "validation.txt").write_text("\n\n".join(texts(60)))
    data = module(folder, mask_rate=rate, block_size=size)
    assert data.targets == targets
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["targets"].shape == (4, targets)


def test_documents_only_on_request(folder: Path) -> None:
    batch = next(iter(module(folder, separate_documents=True).train_dataloader()))
    plain = batch["input_ids"].scatter(1, batch["targets"], batch["labels"])
    ends = (plain == VOCABULARY.separator).long()
    assert torch.equal(batch["documents"], ends.cumsum(1) - ends)
    assert (batch["documents"].diff(dim=1) >= 0).all() and batch["documents"].max() > 0


def test_whole_words(cache_dir: Path, tmp_path: Path) -> None:
    from tests.data.test_wordpiece import topics

    (tmp_path / "train.txt").write_text("\n\n".join(topics()))
    data = MLMDataModule(str(tmp_path), vocab_size=500, block_size=64, batch_size=16, whole_words=True)
    starts = read_vocabulary(data.tokenizer).starts()
    cut = words = 0
    for batch in data.train_dataloader():
        plain = batch["input_ids"].scatter(1, batch["targets"], batch["labels"])
        begins = torch.from_numpy(starts)[plain]
        begins[:, :2] = True
        chosen = torch.zeros_like(begins).scatter(1, batch["targets"], True)
        # A target whose word goes on with a token that is none: a word that was cut.
        cuts = (chosen[:, :-1] & ~begins[:, 1:] & ~chosen[:, 1:]).sum(1)
        assert cuts.max() <= 1, "more than the last word is cut"
        # A target that goes on from what is none.
        assert not (chosen[:, 1:] & ~begins[:, 1:] & ~chosen[:, :-1]).any()
        cut, words = cut + int(cuts.sum()), words + int((chosen & ~begins).sum())
    assert cut > 0 and words > 100


def test_random_words_and_shares(folder: Path) -> None:
    data = module(folder, batch_size=8, mask_rate=0.25)
    counts = np.zeros(3)
    for epoch in range(40):
        for batch in on_rank(data, epoch=epoch).train_dataloader():
            shown = batch["input_ids"].gather(1, batch["targets"])
            masked, kept = shown == VOCABULARY.mask, shown == batch["labels"]
            assert VOCABULARY.ordinary_V[shown[~masked].numpy()].all()
            counts += np.array([int(masked.sum()), int(kept.sum()), int((~masked & ~kept).sum())])
    words = int(VOCABULARY.ordinary_V.sum())
    expected = [0.8, 0.1 + 0.1 / words, 0.1 * (words - 1) / words]
    assert counts.sum() > 10_000
    assert counts / counts.sum() == pytest.approx(expected, abs=0.012)


# -- which documents


def first_documents(data: MLMDataModule, split: str) -> set[str]:
    """The documents of a split."""
    return {piece.text.strip() for piece in data._corpus(split).read()}


def test_held_out_documents(folder: Path) -> None:
    for name in ("validation", "test"):
        (folder / f"{name}.txt").unlink()
    data = module(folder, held_out=0.3)
    train, validation, test = (first_documents(data, split) for split in ("train", "validation", "test"))
    assert train | validation == {*texts(70)} and not train & validation and test == validation
    assert 10 < len(validation) < 35
    data.setup("fit")
    assert len(data.val_dataloader()) > 0


def test_validation_of_its_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("\n\n".join(texts(20, 9)))
    named = module(folder, validation=str(tmp_path / "other.txt"))
    (folder / "validation.txt").unlink()
    unnamed = module(folder, validation=str(tmp_path / "other.txt"))
    for data in (named, unnamed):
        assert first_documents(data, "train") == {*texts(70)}
        assert first_documents(data, "validation") == {*texts(20, 9)}
        assert first_documents(data, "test") == {*texts(12, 2)}


def test_test_falls_back_to_validation(folder: Path) -> None:
    (folder / "test.txt").unlink()
    assert first_documents(module(folder), "test") == {*texts(25, 1)}


def test_test_split_beside_held_out_documents(folder: Path) -> None:
    (folder / "validation.txt").unlink()
    assert first_documents(module(folder), "test") == {*texts(12, 2)}


def test_texts_of_python_are_the_default(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "offline_documents", lambda: tuple(texts(200)))
    data = module(None, held_out=0.2)
    data.setup("fit")
    assert first_documents(data, "train") | first_documents(data, "validation") == {*texts(200)}


def test_one_text_without_empty_lines(cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONG", 300)
    monkeypatch.setattr(documents, "_PIECE", 100)
    (tmp_path / "book.txt").write_text("\n".join(texts(300)))
    data = module(tmp_path / "book.txt")
    data.setup("fit")
    assert len(data.train_dataloader()) > 4 * len(data.val_dataloader()) > 0


# -- reproducible


def test_ranks_see_what_one_process_sees(folder: Path) -> None:
    for epoch in (0, 2):
        one = steps_of([on_rank(module(folder, batch_size=6), epoch=epoch).train_dataloader()])
        assert len(one) > 5
        for world in (2, 3):
            data = [on_rank(module(folder, batch_size=6 // world), rank, world, epoch) for rank in range(world)]
            assert same(steps_of([rank.train_dataloader() for rank in data]), one)


@pytest.mark.parametrize(("world", "size"), [(1, 3), (2, 4), (3, 5), (4, 16)])
def test_validation_masks_are_always_the_same(folder: Path, world: int, size: int) -> None:
    def masks(data: list[MLMDataModule], stage: str) -> dict[int, list[Any]]:
        loaders = [rank.val_dataloader() if stage == "validation" else rank.test_dataloader() for rank in data]
        found: dict[int, list[Any]] = {}
        for step in steps_of(loaders):
            for place, row in enumerate(step["rows"].tolist()):
                assert row not in found, "a block is counted twice"
                found[row] = [step[name][place].tolist() for name in NAMES]
        return found

    for stage in ("validation", "test"):
        base = masks([module(folder)], stage)
        data = [on_rank(module(folder, eval_batch_size=size, seed=7), rank, world, 5) for rank in range(world)]
        assert masks(data, stage) == base and len(base) > 8


def test_seed_and_epoch_change_order_and_masks(folder: Path) -> None:
    drawn = [
        {
            row: batch["targets"][place].tolist()
            for batch in on_rank(module(folder, seed=seed), epoch=epoch).train_dataloader()
            for place, row in enumerate(batch["rows"].tolist())
        }
        for seed, epoch in [(1, 0), (1, 0), (2, 0), (1, 1)]
    ]
    assert drawn[0] == drawn[1] and [*drawn[0]] == [*drawn[1]]
    for other in drawn[2:]:
        assert [*drawn[0]] != [*other]
        common = drawn[0].keys() & other.keys()
        # Two of 15 positions are the same two about once in 100 times.
        assert sum(drawn[0][row] == other[row] for row in common) < 0.1 * len(common)


def test_workers_change_nothing(folder: Path) -> None:
    alone, helped = (list(module(folder, workers=workers).train_dataloader()) for workers in (0, 2))
    assert same(alone, helped)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_goes_on_within_an_epoch(folder: Path, workers: int) -> None:
    whole = list(on_rank(module(folder), epoch=3).train_dataloader())
    loader = on_rank(module(folder, workers=workers), epoch=3).train_dataloader()
    for number, _ in enumerate(loader):
        if number == 4:
            break
    rest = on_rank(module(folder, workers=workers), epoch=3).train_dataloader()
    rest.load_state_dict(loader.state_dict())
    assert same(list(rest), whole[5:])


def test_another_text_to_validate_on_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("the cat\n\n" + (folder / "train.txt").read_text())
    fits = [module(folder, validation=str(path)) for path in (folder / "train.txt", tmp_path / "other.txt")]
    for fit in fits:
        on_rank(fit, epoch=1).setup("fit")
    state = fits[0].train_dataloader().state_dict()
    fits[0].train_dataloader().load_state_dict(state)
    with pytest.raises(UsageError, match="^the texts to validate on: not the same; allowed to go on"):
        fits[1].train_dataloader().load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "^seed is 7, was 42; allowed to go on with a run: the data that it began with$"),
        ({"mask_rate": 0.3}, r"^the number of targets \(mask_rate x block_size\) is 5, was 2; allowed to go on"),
        ({"block_size": 17}, "^block_size is 17, was 16.*; allowed to go on"),
        ({"whole_words": True}, "^whole_words is True, was False; allowed to go on"),
        ({"separate_documents": True}, "^separate_documents is True, was False; allowed to go on"),
        ({"inputs": "other"}, "^the texts to train on: not the same; allowed to go on"),
        ({"tokenizer": None, "vocab_size": 300}, "^the tokenizer: not the same; allowed to go on"),
        ({"seed": 7, "inputs": "other"}, "^the texts to train on: not the same, seed is 7, was 42; allowed to go on"),
    ],
)
def test_another_stream_is_refused_in_any_epoch(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.txt").write_text("the cat\n\n" + (folder / "train.txt").read_text())
    if "inputs" in changes:
        changes = {**changes, "inputs": str(tmp_path / "other")}
    loader = on_rank(module(folder), epoch=1).train_dataloader()
    next(iter(loader))
    for epoch, position in ((1, 1), (1, 0), (2, 1)):
        state = {**loader.state_dict(), "position": position}
        other = on_rank(module(folder, **changes), epoch=epoch).train_dataloader()
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(state)
        del state["stream"]
        other.load_state_dict(state)


def test_what_decides_nothing_may_change(folder: Path, tmp_path: Path) -> None:
    state = module(folder).train_dataloader().state_dict()
    assert torch.load(dumped(state, tmp_path), weights_only=True) == state
    moved = folder.rename(tmp_path / "moved")
    for changes in ({"workers": 1}, {"eval_batch_size": 3}, {"cache_dir": str(tmp_path / "own")}, {"mask_rate": 0.14}):
        module(moved, **changes).train_dataloader().load_state_dict(state)
    assert module(moved).val_dataloader().state_dict()["stream"] == {}


def dumped(content: Any, folder: Path) -> Path:
    """A file as a checkpoint is one."""
    torch.save(content, folder / "state.ckpt")
    return folder / "state.ckpt"


class Reader(L.LightningModule):
    """A module that notes what it is given."""

    tokenizer_name: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.read.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_trainer_continues_within_an_epoch(folder: Path, tmp_path: Path) -> None:
    def fit(ckpt_path: str | None = None) -> Reader:
        reader, data = Reader(), module(folder, batch_size=16)
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
        trainer = L.Trainer(max_epochs=2, callbacks=[checkpoint], accelerator="cpu", **options)
        trainer.fit(reader, data, ckpt_path=ckpt_path, weights_only=True)
        return reader

    whole = fit()
    per_epoch = len(whole.read) // 2
    assert per_epoch > 4
    assert not torch.equal(whole.read[0]["targets"], whole.read[per_epoch]["targets"])
    for step in (3, 3 * ((per_epoch + 3) // 3)):
        assert same(fit(str(tmp_path / f"step={step}.ckpt")).read, whole.read[step:])
    batches = len(whole.validated) // 2
    assert batches > 0 and same(whole.validated[:batches], whole.validated[batches:])


# -- the tokenizer


def test_a_tokenizer_is_trained_on_training_texts(folder: Path) -> None:
    (folder / "train.txt").write_text("\n\n".join(["alpha beta gamma"] * 60))
    (folder / "validation.txt").write_text("\n\n".join(["omega beta gamma"] * 60))
    data = module(folder, tokenizer=None, vocab_size=300)
    words = data.tokenizer.get_vocab()
    assert {"alpha", "beta", "gamma", "[MASK]"} < {*words} and "omega" not in words
    assert data.vocabulary == len(words) <= 300
    again = module(folder, tokenizer=None, vocab_size=300)
    again.setup("validate")
    assert again.tokenizer.get_vocab() == words


def test_a_tokenizer_object_is_taken(folder: Path) -> None:
    own = toy_tokenizer()
    assert module(folder, tokenizer=own).tokenizer is own


def test_the_module_s_tokenizer_comes_before_a_trained_one(folder: Path) -> None:
    owner = SimpleNamespace(tokenizer_name="toy")
    data = on_rank(module(folder, tokenizer=None), lightning_module=owner)
    named = data.tokenizer
    assert same_tokens(named, toy_tokenizer())
    data.setup("fit")
    assert data.tokenizer is named
    owner.tokenizer_name = toy_tokenizer()
    assert data.tokenizer is owner.tokenizer_name
    owner.tokenizer_name = None
    trained = data.tokenizer
    assert not same_tokens(trained, named)
    # As a module does that had none.
    owner.tokenizer_name = trained
    assert data.tokenizer is trained
    blocks = data.load("train")
    assert data.load("train") is blocks
    data._given = "toy"
    assert same_tokens(data.tokenizer, named)


def test_tokenizers_have_blocks_of_their_own(folder: Path) -> None:
    owner = SimpleNamespace(tokenizer_name="toy")
    data = on_rank(module(folder, tokenizer=None), lightning_module=owner)
    first = next(iter(data.val_dataloader()))
    owner.tokenizer_name = None
    second = next(iter(data.val_dataloader()))
    assert not torch.equal(first["input_ids"], second["input_ids"])


# -- the cache


def test_everything_is_built_in_one_process(folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = on_rank(module(folder, tokenizer=None), state=SimpleNamespace(fn=SimpleNamespace(value="fit")))
    data.prepare_data()
    files = {path.name for path in cache_dir.iterdir()}
    assert len([name for name in files if name.endswith(".arrow")]) == 2
    assert len([name for name in files if name.endswith(".json")]) == 1
    for name in ("peft_lightning.data.pack._build", "peft_lightning.data.wordpiece._train"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("built again"))
    later = on_rank(module(folder, tokenizer=None), rank=1, world=2)
    later.setup("fit")
    assert len(later.train_dataloader()) > 0 and len(later.val_dataloader()) > 0
    assert {path.name for path in cache_dir.iterdir()} == files


def test_without_a_trainer_nothing_is_prepared(folder: Path, cache_dir: Path) -> None:
    module(folder).prepare_data()
    assert not list(cache_dir.iterdir())


def test_cache_dir_comes_before_the_environment(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    module(folder, cache_dir=str(tmp_path / "own"), tokenizer=None).setup("fit")
    assert not list(cache_dir.iterdir())
    assert len(list((tmp_path / "own").glob("*.arrow"))) == 2


def test_two_processes_build_once(folder: Path, cache_dir: Path, tmp_path: Path) -> None:
    # What the data module does, without the seconds that it takes to import Lightning.
    script = """
import sys, time
from pathlib import Path
import numpy
from peft_lightning.data import pack, wordpiece
from peft_lightning.data.documents import open_corpus
from peft_lightning.data.vocabulary import read_vocabulary
mine, other, log, inputs, cache = map(Path, sys.argv[1:])
for module, name in ((pack, "_build"), (wordpiece, "_train")):
    def build(*arguments, real=getattr(module, name), name=name):
        with log.open("a") as file:
            file.write(name + " ")
        time.sleep(0.3)
        return real(*arguments)
    setattr(module, name, build)
mine.touch()
while not other.exists():
    time.sleep(0.001)
corpus = open_corpus(str(inputs), "train")
vocabulary = read_vocabulary(wordpiece.trained_tokenizer(corpus, 300, cache))
blocks = pack.packed(corpus, vocabulary, 16, cache)
sys.stdout.write(str(blocks.rows(numpy.arange(len(blocks))).tolist()))
"""
    names = [str(tmp_path / name) for name in ("a", "b")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *order, str(tmp_path / "log"), str(folder), str(cache_dir)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in (names, names[::-1])
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] and len(outputs[0]) > 1000
    assert (tmp_path / "log").read_text().split() == ["_train", "_build"]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_rate": 0.0}, "mask_rate is 0.0; allowed: between 0 and 1, without these"),
        ({"mask_rate": 1.0}, "mask_rate is 1.0; allowed: between 0 and 1"),
        ({"mask_rate": float("nan")}, "mask_rate is nan; allowed: between 0 and 1"),
        ({"held_out": 0.0}, "held_out is 0.0; allowed: between 0 and 1"),
        ({"held_out": 1.5}, "held_out is 1.5; allowed: between 0 and 1"),
        ({"block_size": 15}, "block_size is 15; allowed: from 16 to 65536"),
        ({"block_size": 70_000}, "block_size is 70000; allowed: from 16 to 65536"),
        ({"vocab_size": 299}, "vocab_size is 299; allowed: at least 300"),
        ({"batch_size": 0}, "batch_size is 0; allowed: at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0; allowed: at least 1"),
        ({"seed": -1}, "seed is -1; allowed: at least 0"),
        ({"workers": -1}, "workers is -1; allowed: at least 0"),
        ({"batch_size": True}, "batch_size is True; allowed: a whole number, at least 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0; allowed: a whole number, at least 1"),
        ({"eval_batch_size": "8"}, "eval_batch_size is '8'; allowed: a whole number, at least 1"),
        ({"seed": 1.5}, "seed is 1.5; allowed: a whole number, at least 0"),
        ({"workers": False}, "workers is False; allowed: a whole number, at least 0"),
        ({"block_size": "32"}, "block_size is '32'; allowed: a whole number, from 16 to 65536"),
        ({"block_size": 32.5}, "block_size is 32.5; allowed: a whole number, from 16 to 65536"),
        ({"vocab_size": 300.0}, "vocab_size is 300.0; allowed: a whole number, at least 300"),
        ({"mask_rate": "0.1"}, "mask_rate is '0.1'; allowed: a number between 0 and 1"),
        ({"held_out": True}, "held_out is True; allowed: a number between 0 and 1"),
        ({"whole_words": "no"}, "whole_words is 'no'; allowed: true or false"),
        ({"separate_documents": 1}, "separate_documents is 1; allowed: true or false"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MLMDataModule(**options)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Return what writes a file into a folder that holds nothing else."""

    def into(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(content)

    return into


ENOUGH = "\n\n".join(texts(60)).encode()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (write("train.txt", b""), {}, "train.txt .*: has no text; allowed with block_size 16: 15 tokens"),
        (write("train.txt", b""), {"tokenizer": None}, "train.txt .*: has no text; allowed: some to train a tokenizer"),
        (write("a.txt", b"the cat"), {}, r"a.txt \(without held_out = 0.05\): has 3 tokens in 1 documents; allowed"),
        (write("a.txt", b"cat " * 60), {}, r"a.txt \(held_out = 0.05\): is one short document, of which n"),
        (
            write("a.txt", b"cat cat\n\n" * 26),
            {},
            r"has 3 tokens in 1 documents; .* 15 tokens; or a larger held_out; or",
        ),
        (write("a.txt", b"cat \xff" * 99), {}, "a.txt: is no UTF-8 text: byte 4 is 0xff; allowed: UTF-8"),
        (write("a.csv", b"text\n"), {}, "texts: has no file of a known kind; allowed: .txt, .text, .md, .parquet"),
        (write("a.jsonl", b'{"content": ""}'), {}, "a.jsonl: row 0 is no object with 'text'"),
        (write("a.parquet", b"PAR1"), {}, "a.parquet: cannot be read: "),
        (write("validation.txt", ENOUGH), {}, "inputs has no documents for train"),
        (lambda folder: None, {"batch_size": 500}, r"the split has \d+ rows for a global batch of 500; allowed: at"),
        (lambda folder: None, {"inputs": "no/such.txt"}, "inputs is 'no/such.txt'; allowed: a file or folder that"),
        (lambda folder: None, {"validation": "no/such.txt"}, "validation is 'no/such.txt'; allowed: a file or fold"),
        (lambda folder: None, {"block_size": 1024}, "block_size is 1024; allowed with this tokenizer: at most 512"),
        (lambda folder: None, {"mask_rate": 0.95}, r"\d+ of \d+ blocks have fewer than 15 tokens that are words, one"),
        (lambda folder: None, {"inputs": 5}, "inputs is 5; allowed: files, folders or hub names, or null"),
        (lambda folder: None, {"validation": [5]}, r"validation is \[5\]; allowed: files, folders or hub names, or"),
        (lambda folder: None, {"cache_dir": 5}, "cache_dir is 5; allowed: a folder, or null"),
        (lambda folder: None, {"tokenizer": 5}, "tokenizer is 5; allowed: a fast tokenizer"),
        (lambda folder: None, {"tokenizer": "./none"}, "'./none': its tokenizer cannot be loaded, there is no such fo"),
    ],
)
def test_bad_input_is_one_clear_line(
    folder: Path, change: Callable[[Path], None], options: dict[str, Any], message: str
) -> None:
    change(folder)
    with pytest.raises((DataError, UsageError), match=message) as caught:
        data = module(folder, **options)
        data.setup("fit")
        data.train_dataloader()
    assert "\n" not in str(caught.value)


def test_tokens_that_are_allowed_are_enough(folder: Path) -> None:
    with pytest.raises(DataError, match="mask_rate is 0.95, allowed here: below") as caught:
        module(folder, mask_rate=0.95).setup("test")
    limit = float(str(caught.value).split()[-1])
    module(folder, mask_rate=limit - 0.002).setup("test")
    with pytest.raises(DataError):
        module(folder, mask_rate=limit + 0.002).setup("test")


def rare(folder: Path, parts: int, words: int = 4000) -> None:
    """Training texts with a share of letters that the tokenizer does not know."""
    known = " ".join(np.random.default_rng(3).choice(WORDS, words)).split()
    half = len(known) // 2
    letters = [chr(0x4E00 + number) for number in range(parts * 15)]
    (folder / "train.txt").write_text(" ".join(known[:half] + letters + known[half:]))


def test_a_few_blocks_without_words_cost_only_themselves(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rare(folder, 9)
    expected = blocks_of([(folder / "train.txt").read_text()], toy_tokenizer(), 16)
    kept = [block for block in expected if VOCABULARY.ordinary_V[block].sum() >= 2]
    lost = len(expected) - len(kept)
    assert 7 <= lost <= 9
    with caplog.at_level(logging.WARNING):
        data = module(folder, batch_size=6)
        data.setup("fit")
    message = (
        f"{lost} of {len(expected)} blocks have fewer than 2 tokens that are words, one a target; they are left out"
    )
    assert [record for record in caplog.records if record.getMessage().endswith(f"train.txt: {message}")]
    assert "validation.txt" not in caplog.text
    seen = set()
    for batch in data.train_dataloader():
        plain = batch["input_ids"].scatter(1, batch["targets"], batch["labels"])
        assert plain.tolist() == [kept[row] for row in batch["rows"].tolist()]
        assert VOCABULARY.ordinary_V[batch["labels"].numpy()].all()
        seen |= {*batch["rows"].tolist()}
    assert len(seen) == len(kept) // 6 * 6
    one = steps_of([data.train_dataloader()])
    for workers in (0, 1):
        ranks = [on_rank(module(folder, batch_size=3, workers=workers), rank, 2) for rank in range(2)]
        assert same(steps_of([rank.train_dataloader() for rank in ranks]), one)


def test_more_targets_leave_out_more_blocks(folder: Path) -> None:
    (folder / "train.txt").write_text("\n\n".join(["cat"] * 150 + ["cat " * 14] * 100))
    sizes = [len(module(folder, mask_rate=rate).load("train")) for rate in (0.15, 0.4, 0.6, 0.85)]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] == 100


def test_only_rank_zero_warns_of_blocks_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rare(folder, 9)
    on_rank(module(folder), rank=1, world=2, is_global_zero=False).setup("fit")
    assert "left out" not in caplog.text


def test_texts_of_another_language_are_refused(folder: Path) -> None:
    rare(folder, 60, words=300)
    with pytest.raises(DataError) as caught:
        module(folder).setup("fit")
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder}/train.txt: 7")
    assert " % of the tokens are unknown to the tokenizer; " in message
    assert message.endswith("one a target; mask_rate is 0.15, allowed here: another tokenizer")


@pytest.mark.parametrize(
    "content", ["\n".join(texts(400))[:45_000], "cat " * 400, "\n\n".join(["\n".join(texts(40))] * 10)]
)
def test_small_corpora_are_divided(folder: Path, content: str) -> None:
    write("a.txt", content.encode())(folder)
    data = module(folder)
    data.setup("fit")
    assert len(data.load("train")) > 2 * len(data.load("validation")) > 10


def test_validation_without_documents(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.txt").write_text("a")
    with pytest.raises(DataError, match="validation has no documents for validation"):
        module(folder, validation=str(tmp_path / "other")).setup("fit")


def test_validation_is_not_needed_where_nothing_is_validated(folder: Path) -> None:
    write("a.txt", b"cat " * 60)(folder)
    on_rank(module(folder), limit_val_batches=0).setup("fit")
    with pytest.raises(
        DataError, match="nothing can be held out; allowed: inputs for validation, or limit_val_batches 0"
    ):
        on_rank(module(folder), limit_val_batches=1.0).setup("fit")


def test_nothing_is_predicted(folder: Path) -> None:
    with pytest.raises(UsageError, match="the stage is predict; allowed for this data: fit, validate, test"):
        module(folder).setup("predict")


def test_tokenizer_of_another_language_is_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train.txt").write_text("the cat ist gut " * 20)
    with caplog.at_level(logging.WARNING):
        module(folder).setup("fit")
    assert "of the tokens of train are unknown to the tokenizer" in caplog.text
    assert "validation" not in caplog.text


def test_command_line() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(MLMDataModule, "data")
    for option, expected in [("a.txt", "a.txt"), ("[a.txt, b]", ["a.txt", "b"]), ("null", None)]:
        arguments = ["--data=peft_lightning.data.corpus.MLMDataModule", f"--data.inputs={option}"]
        data = parser.instantiate(parser.parse_args(arguments)).data
        assert isinstance(data, corpus.MLMDataModule) and data.inputs == expected


# -- speed and real data


def test_loading_costs_less_than_two_percent_of_a_step(folder: Path) -> None:
    (folder / "train.txt").write_text("\n\n".join(texts(1000)))
    loader = module(folder, block_size=128, batch_size=16).train_dataloader()
    seconds, started = [], time.perf_counter()
    for _ in loader:
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    # The step of the benchmark, 12 layers of width 256 with 16 x 128 tokens, takes 600 ms on two cores.
    assert len(seconds) > 5 and sorted(seconds)[len(seconds) // 2] < 0.02 * 0.6


@pytest.mark.real_data
def test_real_corpora(shared_data: Path, cache_dir: Path, encoder: str) -> None:
    for name in ("wikitext2", "gutenberg"):
        inputs = shared_data / name / "validation.parquet"
        data = MLMDataModule(str(inputs), tokenizer=encoder, held_out=0.5, separate_documents=True)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape == (32, 128) and batch["targets"].shape == (32, 19)
        assert data.load("train").unknown < 0.05
        text = data.tokenizer.decode(batch["input_ids"].scatter(1, batch["targets"], batch["labels"])[0, 1:])
        assert sum(word in text.split() for word in ("the", "of", "and", "a", "to", "in")) >= 3, json.dumps(text)
