"""What sharding refuses, and that one process sharded over itself trains as it does without; more ranks: two_ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM

from peft_lightning import load
from peft_lightning.callbacks.report import Report
from peft_lightning.errors import UsageError
from peft_lightning.methods import FineTuneModule, SCTDPretrainModule
from peft_lightning.sharding import ShardedStrategy, check_machine
from tests.contract.kinds import writer
from tests.toy import METHODS, build, data, tiny, trainer

SHARDED = (FineTuneModule, SCTDPretrainModule)


def machine(strategy: Any, precision: str = "32-true") -> Any:
    return SimpleNamespace(strategy=strategy, precision=precision)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_which_methods_take_part(method: type[Any]) -> None:
    module = build(method)
    if method in SHARDED:
        check_machine(module, machine(ShardedStrategy()))
    else:
        reason = f"^trainer.strategy = fsdp2: {method.__name__} trains a small part of its model.*; use ddp$"
        with pytest.raises(UsageError, match=reason):
            check_machine(module, machine(ShardedStrategy()))


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(), FSDPStrategy()], ids=lambda s: type(s).__name__)
def test_other_strategies_are_refused(strategy: Any) -> None:
    with pytest.raises(UsageError, match=f"= {type(strategy).__name__}: must be auto, ddp or fsdp2"):
        check_machine(build(FineTuneModule), machine(strategy))


def test_what_else_is_refused() -> None:
    sharded = ShardedStrategy()
    with pytest.raises(UsageError, match="fsdp2: trainer.precision 16-mixed is not among 32-true and bf16-mixed"):
        check_machine(build(FineTuneModule), machine(sharded, "16-mixed"))
    with pytest.raises(UsageError, match="fsdp2: backbone.compile true is not tried"):
        check_machine(build(FineTuneModule, backbone=tiny(compile=True)), machine(sharded))
    with pytest.raises(UsageError, match="fsdp2: tasks whose answers are written word by word"):
        check_machine(build(FineTuneModule, task="toy_copy", backbone=writer(0.1)), machine(sharded))
    with pytest.raises(UsageError, match="bf16-true: must be 32-true, bf16-mixed or 16-mixed"):
        check_machine(build(FineTuneModule), machine(sharded, "bf16-true"))


@pytest.fixture
def _alone() -> Iterator[None]:
    """Take down the process group of one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Seen(L.Callback):
    """Looks at what an optimizer step sees."""

    sharded = False

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        self.sharded = all(isinstance(tensor, DTensor) for p in every for tensor in (p, p.grad))


# With activations that are computed again, clipping by the norm and by value, accumulation, bfloat16.
CASES: dict[str, dict[str, Any]] = {
    "clipped": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    "clipped by value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("method", SHARDED, ids=lambda m: m.__name__)
@pytest.mark.parametrize("case", CASES)
def test_sharded_over_itself(method: type[Any], case: str, tmp_path: Path, cache_dir: Path) -> None:
    ends = []
    for strategy in ("auto", "fsdp2"):
        seen, folder = Seen(), tmp_path / strategy
        # a sum in another order: a large epsilon keeps Adam from making much of it
        module = build(method, backbone=tiny(gradient_checkpointing=case == "clipped"), optim={"lr": 1e-3, "eps": 1e-4})
        fit = trainer(folder, max_steps=7, strategy=strategy, callbacks=[seen, Report(folder)], **CASES[case])
        fit.fit(module, datamodule=data(method=method, batch_size=8))
        assert seen.sharded == (strategy == "fsdp2")
        ends.append((module.owned_state(), fit.test(module, datamodule=data(method=method), verbose=False)))
    assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    again = load(tmp_path / "fsdp2" / "last.ckpt")
    assert type(again) is method
    assert_close(again.owned_state(), ends[1][0], rtol=0, atol=0)
    if method is SCTDPretrainModule:  # the folder that a fit leaves
        folders = [AutoModelForMaskedLM.from_pretrained(tmp_path / s / "model") for s in ("auto", "fsdp2")]
        assert_close(folders[1].state_dict(), folders[0].state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("order", [("auto", "fsdp2"), ("fsdp2", "auto")], ids=" then ".join)
def test_a_run_goes_on_under_another_strategy(order: tuple[str, str], tmp_path: Path, cache_dir: Path) -> None:
    whole = build(FineTuneModule)
    trainer(max_steps=8).fit(whole, datamodule=data())
    last = tmp_path / "last.ckpt"
    for strategy, steps, path in zip(order, (4, 8), (None, last), strict=True):
        module = build(FineTuneModule)
        # the schedule of the rate must know of all steps from the start
        fit = trainer(tmp_path, every_n_steps=4, max_steps=8, strategy=strategy, callbacks=[Stop(steps)])
        fit.fit(module, datamodule=data(), ckpt_path=path, weights_only=True)
        assert fit.global_step == steps
    assert_close(module.owned_state(), whole.owned_state(), rtol=1e-5, atol=1e-5)


class Stop(L.Callback):
    """Ends a fit after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.steps
