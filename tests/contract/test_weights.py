"""Micro-batches that weigh nothing, and tensors that have several names."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from peft_lightning import TaskDataModule
from peft_lightning.files.packed import pack, unpack
from peft_lightning.methods import FineTuneModule
from tests.contract.kinds import reader, writer
from tests.toy import build

WORDS = [{"tokens": ["the", "cat", "is", "good"], "label": ["O", "B-LIKED", "O", "O"]}]
NOTHING = [{"tokens": [""], "label": ["O"]}]  # of which the tokenizer leaves no word


def _trained(rows: list[dict[str, list[str]]], batch_size: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after one step over ``rows``, and the loss that was logged."""
    module = build(FineTuneModule, task="toy_tags", backbone=reader(0.1), dropout=0.0, seed=7)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=len(rows) // batch_size,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    data = TaskDataModule(task="toy_tags", tokenizer="toy", rows={"train": rows}, batch_size=batch_size, seed=seed)
    trainer.fit(module, datamodule=data)
    return {name: p.detach() for name, p in module.named_parameters()}, float(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("seed", range(4))  # the order of two rows is drawn: both are among these
def test_a_micro_batch_without_weight_does_not_change_the_step(seed: int, cache_dir: object) -> None:
    expected, loss = _trained(WORDS, 1)
    found, same = _trained([*NOTHING, *WORDS], 1, seed)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert same == pytest.approx(loss, rel=1e-5) and loss > 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_without_weight_has_loss_0(count: int, cache_dir: object) -> None:
    found, loss = _trained(NOTHING * count, 1)
    assert loss == 0 and all(torch.isfinite(tensor).all() for tensor in found.values())


def test_a_tensor_with_several_names_is_kept_once() -> None:
    options: dict[str, Any] = {"task": "toy_copy", "backbone": writer(0.1), "dropout": 0.0}
    module, other = build(FineTuneModule, **options, seed=1), build(FineTuneModule, **options, seed=2)
    for each in (module, other):
        each.configure_model()
    kept = unpack(pack(module.owned_state()))
    assert set(kept) == {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    other.load_state_dict(kept, strict=False)
    assert_close(other.state_dict(), module.state_dict())
    embedding = other.backbone.shared.weight
    assert other.backbone.encoder.embed_tokens.weight is embedding is other.backbone.decoder.embed_tokens.weight
