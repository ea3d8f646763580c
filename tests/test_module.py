"""The optimiser's settings, seeds per step, and what loading a state refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import BackboneConfig, FineTuneModule, OptimConfig
from peft_lightning.errors import CheckpointError, PeftLightningError, UsageError
from peft_lightning.seeding import step_seed
from peft_lightning.settings import as_config
from tests.toy import build, data, tiny, trainer


def test_linear_schedule_by_hand() -> None:
    optim = OptimConfig(warmup=0.2, schedule="linear")
    factors = [optim.factor(step, 10) for step in range(11)]
    assert_close(factors, [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])


def test_other_schedules() -> None:
    assert OptimConfig(warmup=0.0, schedule="constant").factor(9, 10) == 1.0
    cosine = OptimConfig(warmup=0.0, schedule="cosine")
    assert_close([cosine.factor(step, 10) for step in (0, 5, 10)], [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"optim\.lr = 0\.0: must be above 0"),
        ({"lr": float("nan")}, r"optim\.lr = nan"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0: must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0\.9, 1\.0\)"),
        ({"warmup": 1.5}, "warmup = 1.5"),
        ({"schedule": "step"}, "must be one of linear, cosine, constant"),
        ({"learning_rate": 1.0}, "learning_rate"),
        (BackboneConfig(name="x"), r"OptimConfig: must be one or a mapping, not BackboneConfig\(name='x'"),
        (None, "OptimConfig: must be one or a mapping, not None"),
    ],
)
def test_refused_settings(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_config(OptimConfig, options)


def test_step_seeds_differ_in_every_part_and_repeat() -> None:
    seeds = {step_seed(a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)}
    assert len(seeds) == 81
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3) < 2**63


def test_decay_spares_vectors() -> None:
    module = build(FineTuneModule)
    fit = trainer(max_steps=1)
    fit.fit(module, datamodule=data())
    decayed, spared = fit.optimizers[0].param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and decayed["weight_decay"] > 0
    assert all(p.ndim == 1 for p in spared["params"]) and spared["weight_decay"] == 0


def test_load_state_dict_is_strict_and_takes_the_whole_state_too() -> None:
    one, two = build(FineTuneModule, seed=1), build(FineTuneModule, seed=2)
    for module in (one, two):
        module.configure_model()
    two.load_state_dict(one.state_dict())
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="missing"):
        two.load_state_dict({})
    with pytest.raises(CheckpointError, match="unexpected 1: ghost"):
        two.load_state_dict({**one.state_dict(), "ghost": torch.zeros(1)}, strict=False)


def test_class_weights_weigh_the_loss_and_its_norm() -> None:
    rows = [{"text": "the cat is good", "label": 1}, {"text": "the cat is bad", "label": 0}]
    module = build(FineTuneModule, dropout=0.0, class_weights=[3.0, 1.0])
    module.configure_model()
    source = data(batch_size=2, rows={"train": rows})
    batch = next(iter(source.train_dataloader()))
    total, weight = module.batch_loss(batch)
    logits = module(batch["inputs"])
    each = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    weights = torch.tensor([3.0, 1.0])[batch["labels"]]
    assert_close(total, (each * weights).sum())
    assert_close(weight, torch.tensor(4.0))


def test_a_loss_that_is_not_finite_stops_with_the_step() -> None:
    module = build(FineTuneModule)
    module.configure_model()
    torch.nn.init.constant_(module.head.out.bias, float("nan"))
    message = "training loss is nan at step 1; it begins in head.out, .*; lower optim.lr"
    with pytest.raises(PeftLightningError, match=message):
        trainer(max_steps=2).fit(module, datamodule=data())


def test_full_fine_tuning_in_bfloat16_is_refused() -> None:
    with pytest.raises(UsageError, match="backbone.dtype = 'bfloat16'.*bf16-mixed"):
        build(FineTuneModule, backbone=tiny(dtype="bfloat16"))


def test_a_run_that_diverges_between_two_logged_steps_stops_and_saves_nothing(tmp_path: Path) -> None:
    module = build(FineTuneModule, optim={"lr": 1e30})
    with pytest.raises(PeftLightningError, match="(training loss is nan|training has diverged).*lower optim.lr"):
        trainer(tmp_path, max_epochs=1, log_every_n_steps=50).fit(module, datamodule=data())
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precision_that_converts_what_is_saved_is_refused(precision: Any) -> None:
    with pytest.raises(UsageError, match=f"trainer.precision = {precision}: must be 32-true"):
        trainer(max_steps=1, precision=precision).fit(build(FineTuneModule), datamodule=data())


def test_initial_values_do_not_depend_on_the_default_dtype() -> None:
    one, two = build(FineTuneModule), build(FineTuneModule)
    one.configure_model()
    torch.set_default_dtype(torch.float64)
    try:
        two.configure_model()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(two.owned_state(), one.owned_state(), rtol=0, atol=0)
