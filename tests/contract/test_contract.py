"""The promises of every method (DESIGN.md), for all methods that ``peft_lightning.methods`` exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset

from peft_lightning import MLMDataModule, load
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import CheckpointError
from peft_lightning.files.manifest import MANIFEST_KEY
from peft_lightning.module import MethodModule
from tests.toy import METHODS, TASK_METHODS, build, data, tiny, toy_corpus, trainer

EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
TASKS = pytest.mark.parametrize("method", TASK_METHODS, ids=lambda m: m.__name__)


def state(module: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


class Start(L.Callback):
    """Keeps what a fit begins with, after the method has decided."""

    state: dict[str, Tensor]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = state(pl_module)


def losses(folder: Path) -> list[str]:
    return [row["train/loss"] for row in MetricsCSV(folder).read() if "train/loss" in row]


def batch_of(method: type[MethodModule], rows: int = 8) -> Any:
    module = data(batch_size=rows, method=method)
    module.prepare_data()
    module.setup("fit")
    return next(iter(module.train_dataloader()))


@EVERY
def test_only_declared_parameters_change(method: type[MethodModule]) -> None:
    module = build(method)
    start = Start()
    trainer(max_steps=3, callbacks=[start]).fit(module, datamodule=data(method=method))
    before = start.state
    declared = {id(p) for part in module.declared() for p in part.parameters()}
    changed = 0
    for name, parameter in module.named_parameters():
        if id(parameter) in declared:
            assert parameter.requires_grad, name
            changed += not torch.equal(parameter, before[name])
        else:
            assert not parameter.requires_grad and parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
    assert changed >= 0.9 * len(module.trainable_parameters())


@EVERY
def test_same_seed_same_losses_other_seed_others(method: type[MethodModule], tmp_path: Path) -> None:
    series = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(folder) % 1000)  # the state of the process must not matter
        trainer(tmp_path / folder, max_steps=6).fit(build(method, seed=seed), datamodule=data(seed=seed, method=method))
        series.append(losses(tmp_path / folder))
    assert len(series[0]) == 6
    assert series[0] == series[1] != series[2]


@EVERY
def test_checkpoint_is_small_plain_and_round_trips(method: type[MethodModule], tmp_path: Path) -> None:
    module = build(method)
    trainer(tmp_path, max_steps=6, every_n_steps=3).fit(module, datamodule=data(method=method))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(module.owned_state())
    assert set(module.trainable_parameters()) <= set(content["state_dict"])
    twin = method.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for name, tensor in module.owned_state().items():
        assert torch.equal(twin.owned_state()[name], tensor), name
    assert twin.hparams == module.hparams


@EVERY
def test_test_works_from_the_checkpoint_and_the_backbone_alone(method: type[MethodModule], tmp_path: Path) -> None:
    module = build(method)
    fit = trainer(tmp_path, max_steps=6)
    fit.fit(module, datamodule=data(method=method))
    expected = fit.test(module, datamodule=data(method=method), verbose=False)
    for source in (tmp_path / "last.ckpt",):
        got = trainer().test(load(source), datamodule=data(method=method), verbose=False)
        assert got == expected


@EVERY
def test_loading_is_strict_both_ways(method: type[MethodModule], tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=3).fit(build(method), datamodule=data(method=method))
    good = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = sorted(good["state_dict"])[0]

    def broken(change: Any) -> Path:
        content = copy.deepcopy(good)
        change(content)
        torch.save(content, tmp_path / "broken.ckpt")
        return tmp_path / "broken.ckpt"

    with pytest.raises(CheckpointError, match=f"missing 1: {name}"):
        load(broken(lambda c: c["state_dict"].pop(name)))
    with pytest.raises(CheckpointError, match="unexpected 1: ghost"):
        load(broken(lambda c: c["state_dict"].update(ghost=torch.zeros(1))))
    with pytest.raises(CheckpointError, match=f"different 1: {name}"):
        load(broken(lambda c: c["state_dict"].update({name: torch.zeros(1, 2, 3)})))
    with pytest.raises(CheckpointError, match=r"another backbone \(num_hidden_layers 3 here [24]\)"):
        load(broken(lambda c: c[MANIFEST_KEY]["backbone"].update(num_hidden_layers=3)))
    if method in TASK_METHODS:  # the others' files hold the backbone itself
        with pytest.raises(CheckpointError, match="same shape with other weights"):
            load(broken(lambda c: c[MANIFEST_KEY]["backbone"].update(weights="0")))
    with pytest.raises(CheckpointError, match="names the method 'os.System'"):
        load(broken(lambda c: c[MANIFEST_KEY].update({"class": "os.System"})))
    with pytest.raises(CheckpointError, match="its manifest has no class"):
        load(broken(lambda c: c[MANIFEST_KEY].pop("class")))
    with pytest.raises(CheckpointError, match="its manifest has no hyper_parameters"):
        load(broken(lambda c: c[MANIFEST_KEY].pop("hyper_parameters")))
    with pytest.raises(CheckpointError, match="hyper-parameters do not fit"):
        load(broken(lambda c: c[MANIFEST_KEY]["hyper_parameters"].update(ghost=1)))


@TASKS
def test_the_toy_task_is_learned_and_shuffled_labels_are_not(method: type[MethodModule]) -> None:
    options: dict[str, Any] = {"max_epochs": 8, "limit_val_batches": 0}
    module = build(method, dropout=0.0, backbone=wide())
    fit = trainer(**options)
    fit.fit(module, datamodule=data(batch_size=32))
    assert fit.test(module, datamodule=data(), verbose=False)[0]["test/accuracy"] >= 0.95

    rows = toy_splits()
    shuffled = [
        {**row, "label": other["label"]}
        for row, other in zip(rows["train"], rows["train"][len(rows["train"]) // 2 :] + rows["train"], strict=False)
    ]
    module = build(method, dropout=0.0, backbone=wide())
    fit = trainer(**{**options, "max_epochs": 2})
    fit.fit(module, datamodule=data(batch_size=32, rows={**rows, "train": shuffled}))
    assert abs(fit.test(module, datamodule=data(), verbose=False)[0]["test/accuracy"] - 0.5) < 0.12


def wide() -> dict[str, Any]:
    backbone = tiny(0.0)
    return {**backbone, "config": {**backbone["config"], "hidden_size": 64, "intermediate_size": 128}}


def toy_splits() -> dict[str, list[dict[str, Any]]]:
    return {split: toy_rows("toy_sentiment", split) for split in ("train", "validation", "test")}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@EVERY
def test_precision_and_clipping(method: type[MethodModule], precision: Any) -> None:
    module = build(method)
    trainer(max_steps=3, precision=precision, gradient_clip_val=0.5).fit(module, datamodule=data(method=method))
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in module.parameters())


@EVERY
def test_gradient_checkpointing_changes_no_gradient(method: type[MethodModule]) -> None:
    batch = batch_of(method)
    gradients = []
    for checkpointing in (False, True):
        module: Any = build(method, dropout=0.0, backbone=tiny(0.0, gradient_checkpointing=checkpointing))
        module.configure_model()
        module.train()
        (module.batch_loss(batch) if method in TASK_METHODS else module.losses(batch, "both"))[0].backward()
        gradients.append({n: p.grad for n, p in module.trainable_parameters().items()})
    assert_close(gradients[1], gradients[0])


@TASKS
def test_compiles_without_graph_breaks_and_copies(method: type[MethodModule]) -> None:
    batch = batch_of(method)
    module = build(method, dropout=0.0)
    module.configure_model()
    module.eval()
    expected = module(batch["inputs"])
    assert_close(copy.deepcopy(module)(batch["inputs"]), expected)
    module.backbone.compile(fullgraph=True, backend="aot_eager")
    assert_close(module(batch["inputs"]), expected)


@pytest.mark.slow
@EVERY
def test_the_compile_setting_trains_alike(method: type[MethodModule], tmp_path: Path) -> None:
    for compiled in (False, True):
        module = build(method, dropout=0.0, backbone=tiny(0.0, compile=compiled))
        trainer(tmp_path / str(compiled), max_steps=5).fit(module, datamodule=data(method=method))
    one, two = ([float(loss) for loss in losses(tmp_path / str(compiled))] for compiled in (False, True))
    assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert set(torch.load(tmp_path / "True" / "last.ckpt", weights_only=True)["state_dict"]) == set(
        module.owned_state()
    )


# Decisions that do not depend on the batches.
WITHOUT_DATA: dict[str, dict[str, Any]] = {
    "SparseAdapterModule": {"prune": {"score": "magnitude"}},
    "PruneLoRAModule": {"prune": {"order": "random"}, "lora": {"rank": 4, "high_rank": 4}},
}


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(("rows", "class_weights"), [(40, None), (41, None), (40, [1.0, 5.0])])
@TASKS
def test_accumulation_equals_the_large_batch(
    method: type[MethodModule], rows: int, class_weights: list[float] | None, sized: bool
) -> None:
    """Groups of 2 x 8 rows equal batches of 16, also where micro-batches weigh differently or a group is short."""
    content = toy_rows("toy_sentiment", "train", size=rows)
    # a large epsilon keeps Adam from blowing up differences of rounding in tiny gradients
    options: dict[str, Any] = {"optim": {"lr": 1e-3, "warmup": 0.0, "schedule": "constant", "eps": 1e-3}}
    options |= WITHOUT_DATA.get(method.__name__, {})
    ends = []
    for size, group in ((8, 2), (16, 1)):
        module = build(method, dropout=0.0, class_weights=class_weights, **options)
        loader = fixed_batches(content, size, sized)
        trainer(max_epochs=1, max_steps=100, accumulate_grad_batches=group, gradient_clip_val=0.5).fit(module, loader)
        ends.append(module.owned_state())
    assert_close(ends[0], ends[1], rtol=1e-4, atol=2e-6)


class Stream(IterableDataset[Any]):
    """Batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def fixed_batches(rows: list[dict[str, Any]], size: int, sized: bool) -> DataLoader[Any]:
    """An ordinary loader of batches in the rows' order, with or without a length."""
    tokenizer = toy_tokenizer()
    batches = []
    for chunk in (rows[i : i + size] for i in range(0, len(rows), size)):
        inputs = tokenizer([row["text"] for row in chunk], padding=True, return_tensors="pt")
        batches.append({"inputs": dict(inputs), "labels": torch.tensor([row["label"] for row in chunk])})
    return DataLoader(batches if sized else Stream(batches), batch_size=None)  # type: ignore[arg-type]


@EVERY
def test_a_loaded_module_trains_in_training_mode(method: type[MethodModule], tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=3).fit(build(method), datamodule=data(method=method))
    loaded = load(tmp_path / "last.ckpt")
    assert not loaded.training
    trainer(max_steps=1).fit(loaded, datamodule=data(method=method))
    assert loaded.training and all(part.training for part in loaded.modules() if isinstance(part, torch.nn.Dropout))


PRETRAIN = pytest.mark.parametrize("method", [m for m in METHODS if m not in TASK_METHODS], ids=lambda m: m.__name__)


@PRETRAIN
def test_a_language_is_learned_and_noise_is_not(method: type[MethodModule]) -> None:
    """Masked words of circles are guessed right; those of shuffled texts as often as chance among 30 words has it."""
    for shuffled, low, high in ((False, 0.95, 1.0), (True, 0.0, 0.12)):
        corpus = toy_corpus((("train", 1024), ("validation", 64), ("test", 64)), shuffled)
        module = build(method, dropout=0.0, backbone=wide())
        fit = trainer(max_epochs=2 if shuffled else 24, limit_val_batches=0)
        source = MLMDataModule(inputs=str(corpus), tokenizer="toy", block_size=16, batch_size=32)
        fit.fit(module, datamodule=source)
        assert low <= fit.test(module, datamodule=source, verbose=False)[0]["test/accuracy"] <= high


@PRETRAIN
def test_pretraining_accumulates_like_the_large_batch(method: type[MethodModule]) -> None:
    """Groups of 2 x 8 blocks equal batches of 16: weights, and what the method keeps beside them."""
    options: dict[str, Any] = {"optim": {"lr": 1e-3, "warmup": 0.0, "schedule": "constant", "eps": 1e-3}}
    source = data(batch_size=16, method=method)
    source.setup("fit")
    large = list(source.train_dataloader())[:6]
    small = [{name: part[half] for name, part in b.items()} for b in large for half in (slice(8), slice(8, 16))]
    ends = []
    for batches, group in ((small, 2), (large, 1)):
        module = build(method, dropout=0.0, **options)
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer(max_epochs=1, accumulate_grad_batches=group, gradient_clip_val=0.5).fit(module, loader)
        ends.append(module.owned_state())
    assert_close(ends[0], ends[1], rtol=1e-4, atol=2e-6)
