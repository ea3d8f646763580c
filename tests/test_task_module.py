"""Module and data must mean the same; users' own loaders and kinds work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from peft_lightning import FineTuneModule, SparseAdapterModule, Task, TaskDataModule
from peft_lightning.backbones.families import FAMILIES
from peft_lightning.callbacks.report import Report
from peft_lightning.errors import UsageError
from tests.families import backbone_setting, inputs
from tests.tasks.kinds.test_kinds import ManyLabels
from tests.toy import TINY, build, data, tiny, trainer


def test_another_task_is_refused() -> None:
    with pytest.raises(UsageError, match="the data is toy_sentiment .*negative.*the module is for toy_pairs"):
        trainer(max_steps=1).fit(build(FineTuneModule, task="toy_pairs"), datamodule=data())


def test_rows_longer_than_the_backbone_are_refused() -> None:
    short = {**TINY, "config": {**TINY["config"], "max_position_embeddings": 32}}
    module = build(FineTuneModule, backbone=short)
    with pytest.raises(UsageError, match="max_length = 128: the backbone has 32 positions"):
        trainer(max_steps=1).fit(module, datamodule=data())
    with pytest.raises(UsageError, match="max_length = 128: the backbone has 32 positions"):
        module.predict(["the cat is good"])


def test_a_second_module_gets_its_own_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "good", "bad"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]").save_pretrained(tmp_path)
    shared = TaskDataModule(task="toy_sentiment")
    seen = []
    for tokenizer in ("toy", str(tmp_path)):
        module = build(FineTuneModule, backbone=tiny(tokenizer=tokenizer))
        trainer(max_steps=1).fit(module, datamodule=shared)
        seen.append(int(next(iter(shared.train_dataloader()))["inputs"]["input_ids"].max()))
    assert seen[0] > 3 >= seen[1]


def test_validation_and_prediction_on_an_ordinary_loader() -> None:
    ids = torch.tensor([[2, 6, 7, 3], [2, 8, 9, 3]])
    batch = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "labels": torch.tensor([0, 1])}
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    module = build(FineTuneModule)
    assert 0 <= trainer().validate(module, loader, verbose=False)[0]["val/accuracy"] <= 1
    answers = trainer().predict(module, loader)
    assert answers is not None and [set(a) for a in answers[0]] == [{"label", "probabilities"}] * 2


def test_overfitting_sees_the_same_rows_again() -> None:
    seen: list[list[int]] = []

    class Spy(FineTuneModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch["rows"].tolist())
            return super().training_step(batch, batch_idx)

    trainer(max_epochs=3, overfit_batches=1, limit_val_batches=0).fit(build(Spy), datamodule=data())
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("method", [FineTuneModule, SparseAdapterModule])
def test_a_kind_from_outside_trains_reports_and_is_tested(method: type[Any], tmp_path: Path) -> None:
    task = Task(kind=f"{ManyLabels.__module__}.ManyLabels", labels=("cat", "dog"), metrics=("accuracy",), name="many")
    rows = [{"text": "the cat", "label": ["cat"]}, {"text": "the dog", "label": ["dog"]}] * 16
    source = data(task=task, rows=dict.fromkeys(("train", "validation", "test"), rows))
    module = build(method, task=task)
    fit = trainer(tmp_path, max_epochs=2, callbacks=[Report(tmp_path)])
    fit.fit(module, datamodule=source)
    fit.test(module, datamodule=source, verbose=False)
    assert (tmp_path / "report.json").exists() and (tmp_path / "test.json").exists()


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_class_weights_are_checked(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="class_weights = .* must be 2 numbers above 0"):
        build(FineTuneModule, class_weights=weights)


def test_class_weights_have_no_place_in_a_regression() -> None:
    with pytest.raises(UsageError, match="class_weights"):
        build(FineTuneModule, task="toy_similarity", class_weights=[1.0])


@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_the_token_that_stands_for_a_text(family: str) -> None:
    """First, or last that is no padding: what follows it or comes before it in the batch does not matter."""
    module = build(FineTuneModule, backbone=backbone_setting(family))
    module.configure_model()
    module.eval()
    batch = inputs()
    seen: list[torch.Tensor] = []
    module.head.register_forward_pre_hook(lambda head, args: seen.append(args[0][:, 0].detach()))
    module(batch)
    hidden = module.backbone(**batch).last_hidden_state
    places = batch["attention_mask"].sum(1) - 1 if family != "bert" else torch.zeros(3, dtype=torch.long)
    assert_close(seen[0], hidden[torch.arange(3), places])
    left = {name: tensor.flip(1) for name, tensor in batch.items()} if family == "llama" else batch
    module(left)
    if family == "llama":  # padded on the left: the last place of all
        assert_close(seen[1], module.backbone(**left).last_hidden_state[:, -1])


def test_bart_has_as_many_positions_as_its_configuration_says() -> None:
    setting = backbone_setting("bart")
    setting["config"]["max_position_embeddings"] = 32
    module = build(FineTuneModule, backbone=setting)
    with pytest.raises(UsageError, match="max_length = 128: the backbone has 32 positions"):
        module.predict(["the cat"])


def test_token_types_stop_where_an_architecture_has_none() -> None:
    for family in FAMILIES:
        module = build(FineTuneModule, backbone=backbone_setting(family), task="toy_pairs")
        assert module.predict([("the cat", "the dog")])[0]["label"]
