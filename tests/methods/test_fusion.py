"""AdapterFusion as a method: AdapterHub's outputs, the regulariser in the loss, and files that are complete."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from peft_lightning import FusionModule, SparseAdapterModule, export_adapter, load
from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.manifest import MANIFEST_KEY
from tests.contract.test_contract import fixed_batches
from tests.toy import build, data, tiny, toy_sources, trainer

TEXTS = ["the cat is good", "this dog is not kind"]
PFEIFFER: dict[str, Any] = {"kind": "pfeiffer", "bottleneck": 6}


def built(**options: Any) -> Any:
    module = build(FusionModule, **{"backbone": tiny(0.0), "dropout": 0.0, **options})
    module.configure_model()
    return module


def files_of(module: Any, path: Path) -> Path:
    """A checkpoint of a module as it is."""
    content: dict[str, Any] = {}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def named(folder: Path, *names: str) -> list[str]:
    """AdapterHub's folders of adapters with these names on the toy backbone."""
    for number, name in enumerate(names):
        adapter: Any = {**PFEIFFER, "name": name}
        module: Any = build(
            SparseAdapterModule, backbone=tiny(0.0), adapter=adapter, prune={"sparsity": 0.0}, dropout=0.0
        )
        module.configure_model()
        torch.manual_seed(number)
        for parameter in (p for part in module.adapters.values() for p in part.parameters()):
            torch.nn.init.normal_(parameter, std=0.1)
        export_adapter(module, folder / name, format="adapterhub", head=False)
    return [str(folder / name) for name in names]


def fusion_folder(path: Path, names: list[str], dropout: float | None = None, width: int = 32) -> str:
    """AdapterHub's folder of a random fusion."""
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for layer in range(2):
        site = f"bert.encoder.layer.{layer}.output.adapter_fusion_layer.{','.join(names)}"
        tensors |= {f"{site}.{part}.weight": torch.randn(width, width) * 0.3 for part in ("query", "key", "value")}
        tensors |= {f"{site}.{part}.bias": torch.randn(width) for part in ("query", "key")}
    path.mkdir()
    save_file(tensors, path / "model_adapter_fusion.safetensors")
    config = {"adapter_names": names, "config": {"dropout_prob": dropout}, "hidden_size": width, "model_type": "bert"}
    (path / "adapter_fusion_config.json").write_text(json.dumps(config))
    return str(path)


# -- what it starts from


@pytest.mark.real_data
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_outputs_of_adapterhub(family: str, order: tuple[str, str], shared_data: Path) -> None:
    folder = shared_data / "fixtures" / "adapterhub" / family
    module: Any = FusionModule(
        task="toy_sentiment",
        backbone=BackboneConfig(name=str(folder / "backbone"), tokenizer="toy"),
        sources=[str(folder / "fusion" / name) for name in order],
        fusion=str(folder / "fusion" / "fuse"),
    )
    module.configure_model()
    module.eval()
    expected = load_file(folder / "fusion" / "expected.safetensors")
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert_close(module.states(inputs), expected["last_hidden_state"], rtol=0, atol=1e-5)


def test_adapters_are_the_sources_and_begin_as_their_mean() -> None:
    sources = toy_sources(tiny(0.0), PFEIFFER, {**PFEIFFER, "bottleneck": 9})
    module = built(sources=sources)
    assert [shape.name for shape in module.shapes] == ["source0", "source1"]  # both are called sparse in their files
    for fusion in module.fusions.values():
        with torch.no_grad():
            fusion.value.weight.copy_(torch.eye(32))
            fusion.key.weight.zero_()
    hidden = torch.randn(2, 3, 32)
    for path, fusion in module.fusions.items():
        site = path.partition(".adapter_fusion_layer.")[0]
        updates = []
        for source in sources:
            own = load(source).backbone.get_submodule(f"{site}.adapters.sparse")
            updates.append(own(hidden) - hidden)
        assert_close(fusion(hidden), (updates[0] + updates[1]) / 2, rtol=1e-4, atol=1e-5)


def test_names_of_their_own_stay(tmp_path: Path) -> None:
    module = built(sources=named(tmp_path, "one", "two"))
    assert list(module.fusions)[0] == "encoder.layer.0.output.adapter_fusion_layer.one,two"


def test_a_fusion_to_begin_from(tmp_path: Path) -> None:
    sources, start = named(tmp_path, "one", "two"), fusion_folder(tmp_path / "fuse", ["two", "one"], dropout=0.3)
    module = built(sources=sources, fusion=start)
    given = load_file(tmp_path / "fuse" / "model_adapter_fusion.safetensors")
    own = module.owned_state()
    for name, tensor in given.items():
        assert torch.equal(own[f"backbone.{name.removeprefix('bert.')}"], tensor), name
    assert {fusion.dropout.p for fusion in module.fusions.values()} == {0.3}
    assert {f.dropout.p for f in built(sources=sources, fusion=start, score_dropout=0.1).fusions.values()} == {0.1}
    checkpoint = files_of(module, tmp_path / "a.ckpt")
    expected = module.predict(TEXTS)
    for gone in (*sources, start):
        shutil.rmtree(gone)
    again: Any = load(checkpoint)
    assert again.predict(TEXTS) == expected
    assert {fusion.dropout.p for fusion in again.fusions.values()} == {0.3}


# -- training


@pytest.mark.parametrize("rows", [12, 16])
@pytest.mark.parametrize("group", [1, 2])
def test_the_regulariser_counts_once_a_step(rows: int, group: int) -> None:
    """Gradients of one step are those of the weighted mean loss plus the penalty, whatever is accumulated."""
    content = toy_rows("toy_sentiment", "train", size=rows)
    module = built(penalty=3.0, class_weights=[1.0, 4.0], optim={"lr": 1e-9})
    torch.manual_seed(3)
    for fusion in module.fusions.values():
        torch.nn.init.normal_(fusion.value.weight, std=0.2)
    twin = copy.deepcopy(module)
    (whole,) = list(fixed_batches(content, rows, True))
    logits = twin(whole["inputs"])
    loss = F.cross_entropy(logits, whole["labels"], weight=torch.tensor([1.0, 4.0]))
    for fusion in twin.fusions.values():
        loss = loss + 3.0 * ((torch.eye(32) - fusion.value.weight) ** 2).sum()
    loss.backward()
    fit = trainer(max_epochs=1, accumulate_grad_batches=group)
    fit.fit(module, fixed_batches(content, 8 if group == 2 else rows, True))
    assert fit.global_step == 1
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-5)
    expected = {name: p.grad for name, p in twin.trainable_parameters().items()}
    assert_close({name: p.grad for name, p in module.trainable_parameters().items()}, expected, rtol=1e-4, atol=1e-5)


def test_adapters_are_kept_and_do_not_train(tmp_path: Path) -> None:
    module = built()
    before = {name: tensor.clone() for name, tensor in module.owned_state().items()}
    frozen = {name for name in before if ".adapters." in name}
    assert len(frozen) == 2 * 4 * 4 and not any(name in module.trainable_parameters() for name in frozen)
    fit = trainer(tmp_path, max_steps=4)
    fit.fit(module, datamodule=data())
    after = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(module.trainable_parameters())


def test_sparse_sources_stay_sparse(tmp_path: Path) -> None:
    """S-AF: masks come along, also beside an adapter without any."""
    (sparse, _), (_, dense) = toy_sources(tiny(0.0), keep=0.5), toy_sources(tiny(0.0))
    module = built(sources=[sparse, dense])
    assert module.masked
    given = load(sparse).owned_state()
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(module, datamodule=data())
    again: Any = load(tmp_path / "last.ckpt")
    shares = []
    for name, tensor in again.owned_state().items():
        if name.endswith("_mask"):
            first = ".source0." in name
            shares.append(float(tensor.float().mean()))
            assert torch.equal(tensor, given[name.replace(".source0.", ".sparse.")]) if first else tensor.all()
            assert not again.owned_state()[name.removesuffix("_mask")][~tensor].any()
    assert sum(share < 1 for share in shares) == 8 and len(shares) == 16
    assert again.predict(TEXTS) == module.predict(TEXTS)
    assert again.lines()["fused adapters"] == "source0, source1 (houlsby, 4 places, sparse)"


# -- files


def test_a_file_needs_no_folder_of_a_source(tmp_path: Path) -> None:
    sources = [shutil.copytree(path, tmp_path / f"copy{n}") for n, path in enumerate(toy_sources(tiny(0.0)))]
    module = built(sources=sources)
    expected, checkpoint = module.predict(TEXTS), files_of(module, tmp_path / "a.ckpt")
    export_adapter(module, tmp_path / "own", format="peft_lightning")
    for source in sources:
        shutil.rmtree(source)
    for path in (checkpoint, tmp_path / "own"):
        again: Any = load(path)
        assert again.predict(TEXTS) == expected
        assert again.summary() == module.summary() and again.manifest()["fused"] == module.manifest()["fused"]
    trainer(max_steps=1).fit(load(checkpoint), datamodule=data())
    with pytest.raises(CheckpointError, match="copy0: "):
        built(sources=sources)


def test_counts_are_exact() -> None:
    facts = built().summary()
    assert facts["fusion_parameters"] == 4 * (3 * 32**2 + 2 * 32)
    assert facts["trained_parameters"] == facts["fusion_parameters"] + facts["head_parameters"]
    assert facts["adapters"] == {"kind": "houlsby", "names": ["source0", "source1"]}


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, r"penalty = -1.0: must be at least 0"),
        ({"penalty": float("nan")}, r"penalty = nan: must be"),
        ({"score_dropout": 1.0}, r"score_dropout = 1.0: must be at least 0 and below 1"),
        ({"sources": ["one"]}, r"sources = \['one'\]: must be a list of 2 or more adapters' folders"),
        ({"sources": "one"}, r"sources = 'one': must be a list of 2 or more"),
        ({"sources": [1, 2]}, r"sources = \[1, 2\]: must be a list"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"sources": ["a", "b"], **options}
    with pytest.raises(UsageError, match=message):
        FusionModule(task="toy_sentiment", backbone="x", **given)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    wide = tiny(0.0)
    wide = {**wide, "config": {**wide["config"], "hidden_size": 64}}
    with pytest.raises(CheckpointError, match=r"another backbone \(hidden_size 64 here 32"):
        built(sources=toy_sources(wide))
    with pytest.raises(CheckpointError, match="same shape with other weights"):
        built(sources=toy_sources(tiny(0.0), seed=7))
    with pytest.raises(UsageError, match="must be two adapters or more of one kind"):
        built(sources=toy_sources(tiny(0.0), PFEIFFER, {}))
    sources = named(tmp_path, "one", "two")
    other = fusion_folder(tmp_path / "other", ["one", "three"])
    with pytest.raises(UsageError, match="is over one, three; sources are one, two"):
        built(sources=sources, fusion=other)
    narrow = fusion_folder(tmp_path / "narrow", ["one", "two"], width=16)
    with pytest.raises(CheckpointError, match=r"narrow: belongs to another backbone \(hidden_size 16 here 32"):
        built(sources=sources, fusion=narrow)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    module = built()
    content: dict[str, Any] = {}
    module.on_save_checkpoint(content)

    def broken(fused: Any) -> Path:
        torch.save({**content, MANIFEST_KEY: {**content[MANIFEST_KEY], "fused": fused}}, tmp_path / "b.ckpt")
        return tmp_path / "b.ckpt"

    good = content[MANIFEST_KEY]["fused"]
    for fused in (None, {}, {**good, "adapters": [{"ghost": 1}]}, {**good, "adapters": 3}, {**good, "dropout": "x"}):
        with pytest.raises(CheckpointError, match="damaged"):
            load(broken(fused))
    other = built(sources=toy_sources(tiny(0.0), {"bottleneck": 4}, {}))
    with pytest.raises(CheckpointError, match="not of the shapes that those in sources have"):
        other.on_load_checkpoint(content)
    trainer(tmp_path, max_steps=1).fit(built(), datamodule=data())
    last = str(tmp_path / "last.ckpt")
    with pytest.raises(UsageError, match=r"penalty = 1.0, in the checkpoint 0.01: the checkpoint decides this"):
        trainer(max_steps=2).fit(built(penalty=1.0), datamodule=data(), ckpt_path=last, weights_only=True)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="FusionModule can be written as peft_lightning"):
        export_adapter(built(), tmp_path / "x", format="adapterhub")


def test_states(tmp_path: Path) -> None:
    """The sum of updates changes what the head reads."""
    module = built()
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    module.eval()
    before: Tensor = module.states(inputs)
    with torch.no_grad():
        for fusion in module.fusions.values():
            fusion.value.weight.zero_()
    assert (module.states(inputs) - before).abs().max() > 1e-3
