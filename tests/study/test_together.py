"""Side by side equals alone: losses, weights, predictions; and what happens to one does not happen to others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import FewShotDataModule, SparseAdapterModule
from peft_lightning.backbones.sharing import sharing_backbones
from peft_lightning.errors import PeftLightningError
from peft_lightning.layers.masked import prunable
from peft_lightning.study.alone import run_alone
from peft_lightning.study.block import Block, shape_of
from peft_lightning.study.loop import LoopTrainer, prepare
from peft_lightning.study.outcome import Outcome
from peft_lightning.study.together import Prepared, run_together
from tests.families import backbone_setting, inputs
from tests.study.helpers import folder
from tests.toy import build

CPU = torch.device("cpu")
EPOCHS = 8


def data(seed: int, task: str = "toy_sentiment", **options: Any) -> FewShotDataModule:
    given = {"shots": 10, "batch_size": 8, "max_length": 16, "test_rows": 60, "eval_batch_size": 16, **options}
    return FewShotDataModule(task, tokenizer="toy", seeds=(seed,), seed=seed, **given)


def module(setting: Any, seed: int, **options: Any) -> Any:
    given: dict[str, Any] = {"kind": "pfeiffer", "bottleneck": 6, "init_std": 0.2, **options.pop("adapter", {})}
    return build(
        SparseAdapterModule,
        backbone=setting,
        dropout=0.0,
        seed=seed,
        adapter=given,
        **{"prune": {"sparsity": 0.0}, "optim": {"lr": 1e-2}, **options},
    )


def prepared(one: Any, rows: FewShotDataModule, epochs: int = EPOCHS, precision: str = "32-true") -> Prepared:
    one.configure_model()
    trainer = LoopTrainer(rows, CPU, precision, epochs)
    prepare(one, trainer)
    return Prepared(module=one, data=rows, trainer=trainer)


def alone(one: Any, rows: FewShotDataModule, select: str = "last", precision: str = "32-true") -> Outcome:
    one.configure_model()
    return run_alone(one, rows, device=CPU, precision=precision, epochs=EPOCHS, select=select, tick=lambda share: None)


def compare(settings: list[tuple[Any, FewShotDataModule]], select: str = "last") -> list[Outcome]:
    """Run modules alone and side by side, and assert that nothing differs but the last digits."""
    with sharing_backbones() as shared:
        wanted = [alone(copy.deepcopy(m), copy.copy(rows), select) for m, rows in settings]
        found: Any = run_together([prepared(m, rows) for m, rows in settings], select, lambda share: None)
        shared.check()
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, Outcome), one
        assert len(one.losses) == 20
        assert_close(one.losses, other.losses, rtol=0, atol=1e-5)
        same = sum(
            a == pytest.approx(b, abs=1e-4) for a, b in zip(one.test.predictions, other.test.predictions, strict=True)
        )
        assert same >= 0.99 * len(other.test.predictions)
        assert one.test.truths == other.test.truths
        assert (one.steps, one.epoch, one.trained_parameters) == (other.steps, other.epoch, other.trained_parameters)
        for scores, theirs in ((one.dev, other.dev), (one.test, other.test)):
            assert scores.metrics == pytest.approx(theirs.metrics, abs=1e-4)
    return list(found)


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, Any]:
    return {"name": folder(tmp_path / "backbone"), "tokenizer": "toy"}


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "parallel"])
def test_side_by_side_equals_alone(setting: Any, kind: str) -> None:
    """Two cells on the same rows at other rates, one of another split, one sparse: on shuffled places."""
    shape = {"kind": kind}
    settings = [
        (module(setting, 13, adapter=shape), data(13)),
        (module(setting, 21, adapter=shape, prune={"sparsity": 0.6, "score": "snip"}), data(21)),
        (module(setting, 13, adapter=shape, optim={"lr": 1e-3, "schedule": "constant"}), data(13)),
    ]
    settings[2][1]._encoded = settings[0][1]._encoded  # the same rows, as in a study
    settings[0][1].setup("fit")
    first, sparse, slow = compare(settings)
    assert first.losses[:1] == pytest.approx(slow.losses[:1]) and first.losses[-1] != pytest.approx(slow.losses[-1])
    assert sparse.trained_parameters < first.trained_parameters
    for parameter in prunable(settings[1][0].backbone).values():
        assert parameter.mask is not None and not parameter.weight[~parameter.mask].any()


@pytest.mark.parametrize("task", ["toy_pairs", "toy_similarity", "toy_choice", "toy_tags", "toy_sentiment+prompt"])
def test_every_kind_of_task(setting: Any, task: str, tmp_path: Path) -> None:
    if task.endswith("prompt"):
        from transformers import AutoModelForMaskedLM, BertConfig

        torch.manual_seed(0)
        options = BertConfig.from_pretrained(setting["name"])
        AutoModelForMaskedLM.from_config(options).save_pretrained(tmp_path / "words")
        setting = {"name": str(tmp_path / "words"), "tokenizer": "toy"}
    shots = {"shots_mode": "total", "shots": 20}
    compare([(module(setting, seed, task=task), data(seed, task, **shots)) for seed in (1, 2)])


def test_the_best_epoch_is_each_cell_s_own(setting: Any) -> None:
    found = compare([(module(setting, seed, optim={"lr": 3e-2}), data(seed)) for seed in (1, 2, 3)], select="best")
    assert len({one.epoch for one in found}) > 1


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta-v2", "llama", "qwen3"])
@pytest.mark.parametrize("shared_rows", [False, True])
def test_states_of_every_family(family: str, shared_rows: bool) -> None:
    """What heads read, of cells that read the same rows and of others, one with shorter texts."""
    base = backbone_setting(family)
    setting = {**base, "config": {**base["config"], "num_hidden_layers": 3}}
    with sharing_backbones():
        modules = [module(setting, 5, adapter={"init_std": std}) for std in (0.2, 0.4, 0.6)]
        for one in modules:
            one.configure_model()
            one.eval()
        block = Block(modules)
        block.train(False)
        torch.manual_seed(1)
        long = {"inputs": inputs(), "labels": torch.zeros(1)}
        short = {"inputs": {name: tensor[:1, :-2] for name, tensor in inputs().items()}, "labels": torch.zeros(1)}
        batches = [long, long, long] if shared_rows else [long, short, long]
        with torch.no_grad():
            wanted = [one.states(one.inputs(batch)) for one, batch in zip(modules, batches, strict=True)]
            found = block.states(batches)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one[:, 0], other[:, 0], rtol=1e-4, atol=1e-5)
        assert one.requires_grad is False


def test_dropout_is_the_same_each_time(setting: Any, tmp_path: Path) -> None:
    drops = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    wet = {"name": folder(tmp_path / "wet", **drops), "tokenizer": "toy"}

    def losses() -> list[list[float]]:
        with sharing_backbones():
            cells = [prepared(module(wet, seed), data(seed)) for seed in (1, 2)]
            return [one.losses for one in run_together(cells, "last", lambda share: None)]  # type: ignore[union-attr]

    torch.manual_seed(3)
    once = losses()
    assert once == losses()
    assert once[0] != once[1]


def test_half_precision(setting: Any) -> None:
    half = {**setting, "dtype": "bfloat16"}
    with sharing_backbones():
        rows = [data(1), data(1)]
        first = alone(module(half, 1), rows[0], precision="bf16-mixed")
        cells = [prepared(module(half, seed), data(seed), precision="bf16-mixed") for seed in (1, 2)]
        found: Any = run_together(cells, "last", lambda share: None)
    assert {p.dtype for p in cells[0].module.trainable_parameters().values()} == {torch.float32}
    assert_close(found[0].losses, first.losses, rtol=0, atol=0.05)


def test_a_cell_that_diverges_stops_alone(setting: Any) -> None:
    steady = module(setting, 1)
    with sharing_backbones():
        wanted = alone(copy.deepcopy(steady), data(1))
        wild = module(setting, 1, class_weights=[1.0, 1.0])
        cells = [prepared(wild, data(1)), prepared(steady, data(1))]
        with torch.no_grad():
            wild.head.out.weight.fill_(float("nan"))
        error, found = run_together(cells, "last", lambda share: None)
    assert isinstance(error, PeftLightningError) and "the training loss is nan at step 1" in str(error)
    assert isinstance(found, Outcome)
    assert_close(found.losses, wanted.losses, rtol=0, atol=1e-5)


def test_shapes_that_go_together(setting: Any) -> None:
    with sharing_backbones() as shared:

        def shape(one: Any) -> Any:
            one.configure_model()
            return shape_of(one, shared)

        plain = shape(module(setting, 1))
        assert plain is not None
        assert plain == shape(module(setting, 2, optim={"lr": 1.0}, prune={"sparsity": 0.5, "score": "random"}))
        for options in ({"bottleneck": 7}, {"kind": "houlsby"}, {"nonlinearity": "tanh"}, {"scaling": 2.0}):
            other = shape(module(setting, 1, adapter=options))
            assert other is not None and other != plain
        assert shape(module(setting, 1, adapter={"target": "layer.1"})) != plain
        assert shape(module(setting, 1, adapter={"kind": "lora"})) is None
        assert shape(_trains_more(setting)) is None
    assert shape_of(module_built(setting), shared) is None  # its backbone is its own


def _trains_more(setting: Any) -> Any:
    class More(SparseAdapterModule):
        def declared(self) -> Any:
            yield from super().declared()
            yield self.backbone.get_submodule("encoder.layer.0")

    one = module(setting, 1)
    one.__class__ = More
    return one


def module_built(setting: Any) -> Any:
    one = module(setting, 1)
    one.configure_model()
    return one
