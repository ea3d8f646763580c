"""MerA as a method: when it merges, on what, what it does not touch, and what its files hold."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from peft_lightning import (
    FewShotDataModule,
    MerAModule,
    SparseAdapterModule,
    TaskDataModule,
    export_adapter,
    import_adapter,
    load,
)
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.manifest import MANIFEST_KEY, write_adapter
from peft_lightning.files.sources import read_source
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import MergeSource, merge_adapters
from peft_lightning.methods import mera as method
from peft_lightning.scoring import unlabelled_inputs
from peft_lightning.seeding import seeded_on_cpu
from tests.contract.kinds import data_of, module_of, rows_of
from tests.toy import build, data, tiny, toy_sources, trainer

TEXTS = ["the cat is good", "this dog is not kind"]
INPUTS = {"input_ids": torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] > 0).long()


def mera(**options: Any) -> Any:
    return build(MerAModule, **{"backbone": tiny(0.0), "dropout": 0.0, **options})


def batches(count: int = 4) -> list[Any]:
    source = data(batch_size=8)
    source.setup("fit")
    return list(source.train_dataloader())[:count]


def states(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module.eval().states(INPUTS)
    return found


def adapters(module: Any) -> dict[str, Tensor]:
    """The adapter's tensors, by their names inside the backbone."""
    own = module.owned_state().items()
    return {name.removeprefix("backbone."): tensor for name, tensor in own if name.startswith("backbone.")}


def sources_of(paths: list[str]) -> list[MergeSource]:
    given = [read_source(path) for path in paths]
    return [
        MergeSource(name=f"source{n}", adapter=one.adapter, tensors=one.tensors, masks=one.masks)
        for n, one in enumerate(given)
    ]


# -- what is merged


def test_avg_is_the_mean_of_the_matrices() -> None:
    paths = toy_sources(tiny(0.0))
    module = mera(sources=paths, merge={"preset": "avg"})
    module.configure_model()  # which needs no data
    one, two = (read_source(path).tensors for path in paths)
    expected = {name.replace(".sparse.", ".merged."): (one[name] + two[name]) / 2 for name in one}
    assert_close(adapters(module), expected)


@pytest.mark.parametrize("preset", ["wts", "acts", "acts+", "select"])
def test_the_trainer_merges_as_by_hand(preset: str) -> None:
    """On inputs of the training split, in the loader's order, as many batches as it takes."""
    paths = toy_sources(tiny(0.0))
    module = mera(sources=paths, merge={"preset": preset, "tokens": 200})
    source = data(batch_size=8)
    trainer().validate(module, datamodule=source, verbose=False)
    bare = build_of(module)
    given = [batch["inputs"] for batch in source.calibration_dataloader()]
    config = MergeConfig(preset=preset, tokens=200)
    expected = merge_adapters(bare, sources_of(paths), config, lambda: given)
    assert_close(adapters(module), expected.tensors)
    if preset != "wts":
        assert 200 <= module.merged["tokens"] < 200 + max(int(one["attention_mask"].sum()) for one in given)
        by_hand = mera(sources=paths, merge={"preset": preset, "tokens": 200})
        by_hand.merge_sources({"inputs": one} for one in given)
        assert_close(adapters(by_hand), expected.tensors)
    assert list(module.merged["sites"]) == [path.partition(".adapters.")[0] for path in module.adapters]


def build_of(module: Any) -> torch.nn.Module:
    """The bare backbone that a module was built on."""
    with seeded_on_cpu(module.seed):
        return build_backbone(module.backbone_config)


@pytest.mark.parametrize("preset", ["sum", "avg", "wts", "acts", "acts+"])
@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "parallel"])
def test_one_source_is_itself(preset: str, kind: str) -> None:
    (path,) = toy_sources(tiny(0.0), {"kind": kind, "scaling": 1.5})
    module = mera(sources=[path], merge={"preset": preset})
    assert_close(states(module.merge_sources()), states(load(path)))
    assert module.merged is not None and module.adapter.scaling == 1.0


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["double_seq_bn", "seq_bn", "par_bn", "lora"])
def test_one_source_is_what_an_import_gives(name: str, shared_data: Path) -> None:
    """The paper's +Single."""
    folder = shared_data / "fixtures" / "adapterhub" / "bert"
    backbone: Any = BackboneConfig(name=str(folder / "backbone"), tokenizer="toy")
    preset = "cat" if name == "lora" else "acts+"
    module: Any = MerAModule(
        task="toy_sentiment", backbone=backbone, sources=[str(folder / name)], merge=MergeConfig(preset=preset)
    )
    module.configure_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        imported = import_adapter(folder / name, task="toy_sentiment", backbone=backbone)
    assert_close(states(module), states(imported))
    assert (states(module) - build_of(module).eval()(**INPUTS).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["wts", "acts+"])
def test_an_adapter_and_its_permutation_are_one(preset: str, tmp_path: Path) -> None:
    (path,) = toy_sources(tiny(0.0), {"kind": "pfeiffer"})
    twin: Any = load(path)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for adapter in twin.adapters.values():
            down, up = adapter.adapter_down[0], adapter.adapter_up
            down.weight.copy_(down.weight[order])
            down.bias.copy_(down.bias[order])
            up.weight.copy_(up.weight[:, order])
    write_adapter(tmp_path / "twin", twin.owned_state(), twin.manifest())
    module = mera(sources=[path, tmp_path / "twin"], merge={"preset": preset})
    module.merge_sources(batches())
    assert_close(states(module), states(load(path)), rtol=1e-4, atol=1e-5)
    plain = mera(sources=[path, tmp_path / "twin"], merge={"preset": "avg"}).merge_sources()
    assert (states(plain) - states(load(path))).abs().max() > 1e-2


def test_lora_updates_are_added_up() -> None:
    lora = {"kind": "lora", "bottleneck": 3, "init_std": 0.3}
    paths = toy_sources(tiny(0.0), lora, {**lora, "bottleneck": 2, "scaling": 2.0})
    module = mera(sources=paths, merge={"preset": "cat", "weights": [1.0, 3.0], "scale": "sum"})
    module.configure_model()
    bare = build_of(module)
    for path, weight in zip(paths, (1.0, 3.0), strict=True):
        for name, part in load(path).adapters.items():
            linear: Any = bare.get_submodule(name.partition(".loras.")[0])
            linear.weight.data += weight * part.scaling * part.lora_B @ part.lora_A
    assert_close(states(module), bare.eval()(**INPUTS).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert module.adapter.bottleneck == 5


def test_sparse_sources_give_a_sparse_adapter(tmp_path: Path) -> None:
    paths = toy_sources(tiny(0.0), keep=0.3)
    module = mera(sources=paths, merge={"tokens": 300})
    trainer(tmp_path, max_steps=5).fit(module, datamodule=data())
    again: Any = load(tmp_path / "last.ckpt")
    own = adapters(again)
    masks = {name: mask for name, mask in own.items() if name.endswith("_mask")}
    assert len(masks) == 8 and again.masked
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert 0.3 < kept / total < 0.55  # a union of two that keep 0.3
    for name, mask in masks.items():
        assert not own[name.removesuffix("_mask")][~mask].any(), name
    facts = again.summary()
    assert facts["kept_share"] == pytest.approx(kept / total)
    assert facts["adapter_parameters"] == kept + 4 * (16 + 32)
    assert f"{kept / total:.4f} of its weights kept" in again.lines()["adapters"]
    assert again.predict(TEXTS) == module.predict(TEXTS)


def test_a_budget_gives_masks_to_dense_sources() -> None:
    module = mera(merge={"preset": "wts", "recipe": {"masks": "budget", "budget": 100}})
    module.configure_model()
    assert module.summary()["kept_share"] == pytest.approx(100 / (2 * 16 * 32))


# -- when it is merged


class Looks(L.Callback):
    """Keeps the adapter at every validation's start, and whether it is there."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        assert pl_module.merged is not None
        self.seen.append({name: tensor.clone() for name, tensor in adapters(pl_module).items()})


def test_the_sanity_check_sees_the_merged_adapter() -> None:
    module, looks = mera(), Looks()
    fit = trainer(max_steps=1, num_sanity_val_steps=1, callbacks=[looks])
    fit.fit(module, datamodule=data())
    expected = mera()
    trainer().validate(expected, datamodule=data(), verbose=False)
    assert_close(looks.seen[0], adapters(expected), rtol=0, atol=0)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_it_merges_without_a_fit(what: str) -> None:
    module = mera()
    module.configure_model()
    assert module.manifest()["merged"] is None
    getattr(trainer(), what)(module, datamodule=data())
    assert module.merged["preset"] == "select"
    module.predict(TEXTS)


def test_it_is_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        calls.append(1)
        return merge_adapters(*given)

    monkeypatch.setattr(method, "merge_adapters", counted)
    paths = [str(shutil.copytree(path, tmp_path / f"s{n}")) for n, path in enumerate(toy_sources(tiny(0.0)))]
    module = mera(sources=paths)
    trainer(tmp_path / "run", max_steps=3).fit(module, datamodule=data())
    trainer().test(module, datamodule=data(), verbose=False)
    assert module.merge_sources() is module and len(calls) == 1
    for path in paths:
        shutil.rmtree(path)
    again: Any = load(tmp_path / "run" / "last.ckpt")
    assert again.predict(TEXTS) == module.predict(TEXTS)
    last = str(tmp_path / "run" / "last.ckpt")
    trainer(max_steps=6).fit(load(last), datamodule=data(), ckpt_path=last, weights_only=True)
    trainer(max_steps=1).fit(again, datamodule=data())
    assert len(calls) == 1
    assert again.merged == module.merged and again.merged["origins"][0]["files"].keys() == {"adapter.safetensors"}


def test_a_file_from_before_the_merge(tmp_path: Path) -> None:
    """It is merged when there is data, from the sources."""
    module = mera()
    module.configure_model()
    content: dict[str, Any] = {}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "early.ckpt")
    early: Any = load(tmp_path / "early.ckpt")
    with pytest.raises(UsageError, match="predict: the adapters are not merged yet"):
        early.predict(TEXTS)
    with pytest.raises(CheckpointError, match="was saved before its sources were merged"):
        read_source(tmp_path / "early.ckpt")
    for one in (early, module):
        trainer().test(one, datamodule=data(), verbose=False)
    assert_close(adapters(early), adapters(module), rtol=0, atol=0)


# -- what a merge leaves as it is


def test_no_random_state_is_touched() -> None:
    module = mera(merge={"tokens": 100})
    module.configure_model()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    module.merge_sources(batches())
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.grad is not None for parameter in module.parameters())
    assert all(part.training for part in module.modules())


def test_dropout_is_off() -> None:
    paths = toy_sources(tiny(0.0))
    merged = []
    for dropout in (0.0, 0.5):
        module = mera(backbone=tiny(dropout), sources=paths).train()
        module.merge_sources(batches())
        merged.append(adapters(module))
    assert_close(merged[0], merged[1], rtol=0, atol=0)


class Rows(L.Callback):
    """Keeps the head that a fit begins with, and the rows of its batches."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.head = {name: tensor.clone() for name, tensor in pl_module.head.state_dict().items()}
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(batch["rows"].tolist())


def test_head_and_batches_do_not_depend_on_the_merge() -> None:
    seen = []
    for preset in ("wts", "acts+"):
        seen.append(Rows())
        trainer(max_steps=4, callbacks=[seen[-1]]).fit(mera(merge={"preset": preset}), datamodule=data())
    assert seen[0].rows == seen[1].rows and len(seen[0].rows) == 4
    assert_close(seen[0].head, seen[1].head, rtol=0, atol=0)


# -- what it is calibrated on


class Own(TaskDataModule):
    """Gives a calibration set of its own: rows without labels."""

    def calibration_dataloader(self, stage: str = "train") -> Any:
        return [{"inputs": batch["inputs"]} for batch in batches(1)]


def test_the_data_modules_own_rows() -> None:
    module = mera()
    trainer().validate(module, datamodule=Own(task="toy_sentiment", tokenizer="toy"), verbose=False)
    assert module.merged["tokens"] == int(batches(1)[0]["inputs"]["attention_mask"].sum())


def test_an_ordinary_loader_calibrates_a_fit_only() -> None:
    loader: Any = DataLoader(batches(3), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match="validate: needs unlabelled inputs, and a data module with a calibration_data"
    ):
        trainer().validate(mera(), loader, verbose=False)
    module = mera()
    trainer(max_steps=1).fit(module, loader)
    assert module.merged["tokens"] == sum(int(batch["inputs"]["attention_mask"].sum()) for batch in batches(3))


@pytest.mark.parametrize(("calibration", "rows"), [("shots", 8), ("pool", 30)])
def test_shots_or_the_pool(calibration: str, rows: int) -> None:
    source = FewShotDataModule(
        task="toy_sentiment", tokenizer="toy", shots=4, calibration=calibration, calibration_rows=30
    )
    module = mera()
    trainer(max_steps=1).fit(module, datamodule=source)
    encoded = source.unlabelled("train")
    assert len(encoded) == rows and module.merged["tokens"] == int(encoded.lengths().sum())


def test_answers_are_calibrated_on_where_a_backbone_writes() -> None:
    """Decoder adapters read what they read in training: the labels, one late, without padding."""
    source = data_of("generate", rows_of("generate", {"train": 8, "validation": 1, "test": 1}), batch_size=8)
    source.setup("fit")
    (batch,) = source.train_dataloader()
    module = module_of("generate", MerAModule)
    module.configure_model()
    (inputs,) = unlabelled_inputs(module, [batch])
    assert torch.equal(inputs["decoder_attention_mask"].bool(), batch["labels"] != -100)
    assert inputs["decoder_input_ids"].shape == batch["labels"].shape
    assert module.merge_sources([batch]).merged["tokens"] == int(batch["inputs"]["attention_mask"].sum())


# -- files and other formats


def test_the_manifest_says_how_it_came_about(tmp_path: Path) -> None:
    module = mera()
    trainer(tmp_path, max_steps=2).fit(module, datamodule=data())
    manifest = torch.load(tmp_path / "last.ckpt", weights_only=True)[MANIFEST_KEY]
    assert manifest["merged"]["recipe"]["repair"] == "refit"
    assert manifest["adapter"]["bottleneck"] == 16 and "adapter" not in manifest["hyper_parameters"]
    origins = manifest["merged"]["origins"]
    assert [(origin["name"], origin["knows_weights"]) for origin in origins] == [("source0", True), ("source1", True)]
    assert module.lines()["merged"] == f"select of source0, source1, on {module.merged['tokens']:,} tokens"


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["pfeiffer", "lora"])
def test_other_formats_read_what_is_written(kind: str, keep: float, tmp_path: Path) -> None:
    preset = "cat" if kind == "lora" else "wts"
    module = mera(sources=toy_sources(tiny(0.0), {"kind": kind}, {"kind": kind}, keep=keep), merge={"preset": preset})
    module.configure_model()
    backbone = BackboneConfig(**tiny(0.0))
    for format in ("adapterhub", *(("peft",) if kind == "lora" else ())):
        export_adapter(module, tmp_path / format, format=format, head=True)
        again: Any = import_adapter(tmp_path / format, task="toy_sentiment", backbone=backbone)
        assert isinstance(again, SparseAdapterModule)
        assert again.predict(TEXTS) == module.predict(TEXTS)
        assert again.summary()["kept_share"] == pytest.approx(module.summary()["kept_share"])
        assert_close(
            states(mera(sources=[tmp_path / format], merge={"preset": preset}).merge_sources()), states(module)
        )
    export_adapter(module, tmp_path / "own", format="peft_lightning")
    own: Any = load(tmp_path / "own")
    assert own.predict(TEXTS) == module.predict(TEXTS) and own.manifest() == module.manifest()
    single = mera(sources=[tmp_path / "own"], merge={"preset": preset}).merge_sources()
    assert_close(states(single), states(module))


def test_nothing_is_exported_before_the_merge(tmp_path: Path) -> None:
    for format in ("adapterhub", "peft_lightning"):
        with pytest.raises(UsageError, match="export: the adapters are not merged yet, for merge.preset = 'select'"):
            export_adapter(mera(), tmp_path / format, format=format)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    module = mera(merge={"preset": "wts"})
    trainer(tmp_path, max_steps=1).fit(module, datamodule=data())
    good = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key, value in (
        ("adapter", None), ("adapter", {"ghost": 1}), ("adapter", {"bottleneck": 0}),
        ("merged", 3), ("merged", {}), ("merged", {"tokens": "x", "sources": []}),
        ("merged", {"tokens": 1, "sources": 2}),
    ):  # fmt: skip
        content = copy.deepcopy(good)
        content[MANIFEST_KEY][key] = value
        torch.save(content, tmp_path / "broken.ckpt")
        with pytest.raises(CheckpointError, match="damaged"):
            load(tmp_path / "broken.ckpt")
    other = mera(sources=toy_sources(tiny(0.0), {"bottleneck": 4}))
    other.configure_model()
    with pytest.raises(CheckpointError, match="the sources give"):
        other.on_load_checkpoint(good)
    with pytest.raises(UsageError, match=r"merge.preset = avg, in the checkpoint wts: the checkpoint decides this"):
        again = mera(merge={"preset": "avg"})
        trainer(max_steps=2).fit(again, datamodule=data(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)


# -- what is refused


def test_predict_needs_a_merge() -> None:
    with pytest.raises(UsageError, match="predict: the adapters are not merged yet.*merge_sources"):
        mera().predict(TEXTS)
    with pytest.raises(UsageError, match="needs unlabelled data"):
        mera().merge_sources()
    assert len(mera(merge={"preset": "wts"}).predict(TEXTS)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, r"sources = \[\]: must be a list of 1 or more adapters' folders"),
        ({"sources": "a"}, r"sources = 'a': must be a list"),
        ({"merge": {"preset": "mean"}}, r"merge.preset = 'mean': must be one of"),
        ({"merge": 3}, r"MergeConfig: must be one or a mapping"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MerAModule(task="toy_sentiment", backbone="x", **{"sources": ["a"], **options})


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="same shape with other weights"):
        mera(sources=toy_sources(tiny(0.0), seed=7)).configure_model()
    with pytest.raises(CheckpointError, match="nowhere"):
        mera(sources=[tmp_path / "nowhere"]).configure_model()
    with pytest.raises(UsageError, match="adapter.nonlinearity: source0 has 'relu', source1 has 'gelu'"):
        mera(sources=toy_sources(tiny(0.0), {}, {"nonlinearity": "gelu"})).configure_model()
    with pytest.raises(UsageError, match=r"merge.weights = \[1.0\]: must be 2, one for each adapter"):
        mera(merge={"weights": [1.0]}).configure_model()
    with pytest.raises(UsageError, match="merge.preset = 'select': LoRA adapters have cat"):
        mera(sources=toy_sources(tiny(0.0), {"kind": "lora"})).configure_model()


def test_learning_from_shots_starts_at_the_merged_adapter(tmp_path: Path) -> None:
    """A validation before the first step, and the fit's first, differ by the steps between only."""
    rows = {split: toy_rows("toy_sentiment", split, size=64) for split in ("train", "validation", "test")}
    source = FewShotDataModule(task="toy_sentiment+prompt", tokenizer="toy", rows=rows, shots=4)
    module = mera(task="toy_sentiment+prompt", optim={"lr": 1e-12})
    before = trainer().validate(module, datamodule=source, verbose=False)[0]
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(mera(task="toy_sentiment+prompt", optim={"lr": 1e-12}), datamodule=source)
    assert float(fit.callback_metrics["val/loss"]) == pytest.approx(before["val/loss"], rel=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_it_merges_alike() -> None:
    merged = []
    for accelerator in ("cpu", "gpu"):
        module = mera()
        trainer(accelerator=accelerator, max_steps=1).validate(module, datamodule=data(), verbose=False)
        merged.append({name: tensor.cpu() for name, tensor in adapters(module).items()})
    assert_close(merged[1], merged[0], rtol=1e-3, atol=1e-3)
