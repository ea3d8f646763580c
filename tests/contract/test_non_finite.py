"""A loss or a gradient that is not finite, for every method: skipped with a count, or the end, and said where."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.errors import PeftLightningError, UsageError
from peft_lightning.methods import FineTuneModule
from peft_lightning.module import MethodModule
from tests.contract.kill_worker import join
from tests.contract.test_resume import rows
from tests.toy import METHODS, build, data, trainer

EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
UNKNOWN = 1  # the toy tokenizer's word for what it does not know
BAD_ROW = 17


class Poison(L.Callback):
    """Makes one example's first word, or a gradient in its step, not finite; and watches the weights.

    Where tensors are cut up, hooks of parameters are not called, and no rank may look at them by itself.
    """

    def __init__(self, gradient: bool = False, value: float = torch.inf, sharded: bool = False) -> None:
        self.gradient, self.value, self.sharded, self.bad = gradient, value, sharded, False
        self.bad_steps: list[int] = []
        self.name = ""
        self.before: dict[str, Tensor] = {}
        self.unchanged: list[bool] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        words = next(m for n, m in pl_module.named_modules() if n.endswith("word_embeddings"))
        words.register_forward_hook(self._spoil)
        self.name, parameter = list(pl_module.trainable_parameters().items())[1]
        if not self.sharded:
            parameter.register_hook(lambda g: g * self.value if self.bad and self.gradient else g)

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.sharded and self.bad and self.gradient:
            pl_module.trainable_parameters()[self.name].grad.mul_(self.value)

    def _spoil(self, module: Any, args: Any, output: Tensor) -> Tensor:
        unknown = (args[0] == UNKNOWN).unsqueeze(-1)
        return output if self.gradient else output.masked_fill(unknown, self.value)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ids = batch.get("inputs", batch)["input_ids"]
        at = (batch["rows"] == BAD_ROW).nonzero().flatten()
        self.bad = bool(len(at))
        if self.bad:
            ids[at, 1] = UNKNOWN
            self.bad_steps.append(trainer.global_step + 1)
        if self.sharded:
            return
        if trainer.accumulate_grad_batches == 1 or batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = {n: t.detach().clone() for n, t in pl_module.owned_state().items()}
            self.before |= {f"moment {i}": t for i, t in enumerate(self._moments(trainer))}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self.bad_steps[-1:] == [trainer.global_step] and not self.sharded:
            now = dict(pl_module.owned_state()) | {f"moment {i}": t for i, t in enumerate(self._moments(trainer))}
            self.unchanged.append(all(torch.equal(now[n], t) for n, t in self.before.items()))

    @staticmethod
    def _moments(trainer: L.Trainer) -> list[Tensor]:
        states = trainer.optimizers[0].state.values()
        return [state[key].clone() for state in states for key in ("exp_avg", "exp_avg_sq", "step")]


def fit(method: type[MethodModule], folder: Path, poison: Poison, **options: Any) -> Any:
    settings = {name: options.pop(name) for name in ("non_finite", "keep_bad_batches") if name in options}
    module = build(method, optim={"lr": 1e-3, **settings})
    run = trainer(callbacks=[poison], logger=MetricsCSV(folder), default_root_dir=folder, max_epochs=2, **options)
    run.fit(module, datamodule=data(batch_size=8, rows=rows(), method=method))
    return module


@EVERY
@pytest.mark.parametrize("gradient", [False, True])
def test_skipping_changes_nothing_and_says_why(
    method: type[MethodModule], gradient: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    poison = Poison(gradient)
    with caplog.at_level(logging.WARNING, "peft_lightning.non_finite"):
        module = fit(method, tmp_path, poison, non_finite="skip")
    assert poison.bad_steps and poison.unchanged == [True] * len(poison.bad_steps)
    assert module.skipped_steps == len(poison.bad_steps)
    logged = [row["step"] for row in MetricsCSV(tmp_path).read() if "train/skipped_steps" in row]
    assert logged == [str(step) for step in poison.bad_steps]
    assert all(torch.isfinite(p).all() for p in module.trainable_parameters().values())
    for step, record in zip(poison.bad_steps, caplog.records, strict=True):
        said = record.getMessage()
        if gradient:
            assert f"the gradient is not finite at step {step}; it begins in the gradient of {poison.name}" in said
            assert "17" in said.partition("examples ")[2]  # of those of the step
        else:
            assert f"the training loss is nan at step {step}; it begins in " in said
            assert "embeddings.word_embeddings, examples 17; the step is skipped" in said


@EVERY
@pytest.mark.parametrize("gradient", [False, True])
def test_stopping_is_the_default(method: type[MethodModule], gradient: bool, tmp_path: Path) -> None:
    poison = Poison(gradient, torch.nan)
    what = "the gradient is not finite" if gradient else "the training loss is nan"
    where = "gradient of .*" if gradient else ".*word_embeddings, examples 17;"
    with pytest.raises(PeftLightningError, match=rf"{what} at step \d+; it begins in (the )?{where}.*non_finite skip"):
        fit(method, tmp_path, poison)
    assert len(MetricsCSV(tmp_path).read()) >= poison.bad_steps[0] - 1
    assert not (tmp_path / "bad_batches").exists()


@EVERY
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_within_an_accumulation(method: type[MethodModule], precision: str, tmp_path: Path) -> None:
    """The whole step goes, and the file has all of its micro-batches; safetensors reads them."""
    poison = Poison()
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "precision": precision, "keep_bad_batches": True}
    module = fit(method, tmp_path, poison, non_finite="skip", **options)
    assert module.skipped_steps == len(poison.bad_steps) and all(poison.unchanged)
    files = sorted((tmp_path / "bad_batches").iterdir())
    assert [file.name for file in files] == sorted(f"step-{step}.safetensors" for step in poison.bad_steps)
    with safe_open(files[0], "pt") as content:
        facts = content.metadata()
        names = list(content.keys())
        kept = [content.get_tensor(name).tolist() for name in names if name.endswith(".rows")]
        ids = [content.get_tensor(name) for name in names if name.endswith("input_ids")]
    assert json.loads(facts["examples"]) == [17] and "word_embeddings" in facts["tensor"] and facts["loss"] == "nan"
    assert sum(17 in part for part in kept) == 1 and len(kept) == len(ids) <= 3
    assert sum(bool((part == UNKNOWN).any()) for part in ids) == 1


def on_a_rank(folder: Path, gradient: bool, strategy: str, ranks: int, rank: int, port: int) -> None:
    """One of the processes of the test below."""
    many = join(ranks, rank, port, strategy)
    method = FineTuneModule if strategy == "fsdp2" else METHODS[0]
    os.environ["PEFT_LIGHTNING_CACHE"] = str(folder / "cache")
    poison = Poison(gradient, sharded=strategy == "fsdp2")
    settings = {"lr": 1e-3, "non_finite": "skip", "keep_bad_batches": True}
    module = build(method, optim=settings)
    run = trainer(callbacks=[poison], default_root_dir=folder, max_epochs=2, accumulate_grad_batches=2, **many)
    run.fit(module, datamodule=data(batch_size=4, rows=rows()))
    torch.save((module.skipped_steps, poison.bad_steps, module.owned_state()), folder / f"{rank}.pt")
    settings["non_finite"] = "stop"
    module = build(method, optim=settings)
    try:
        run = trainer(
            callbacks=[Poison(gradient, sharded=strategy == "fsdp2")], default_root_dir=folder, max_epochs=2, **many
        )
        run.fit(module, datamodule=data(batch_size=4, rows=rows()))
    except PeftLightningError as error:
        (folder / f"{rank}.txt").write_text(str(error))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_decide_alike(gradient: bool, strategy: str, tmp_path: Path) -> None:
    """One of them has the bad example; both skip, and both say which it was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contract.kill_worker"])
    given = (tmp_path, gradient, strategy, 2)
    processes = [context.Process(target=on_a_rank, args=(*given, rank, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    ends = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    bad = ends[0][1] + ends[1][1]
    assert ends[0][0] == ends[1][0] == len(bad) == 2  # once an epoch, on either rank
    assert_close(ends[1][2], ends[0][2], rtol=0, atol=0)
    files = {path.name for path in (tmp_path / "bad_batches").iterdir()}
    assert {f"step-{step}.safetensors" for step in bad} <= files
    with safe_open(tmp_path / "bad_batches" / f"step-{bad[0]}.safetensors", "pt") as content:
        assert {name.partition(".")[0] for name in content.keys()} == {"rank0", "rank1"}
        assert 17 in json.loads(content.metadata()["examples"])
    said = [(tmp_path / f"{rank}.txt").read_text().partition("; the batch")[0] for rank in (0, 1)]
    assert said[0] == said[1] and "17" in said[0].partition("examples ")[2]
    assert ("gradient of" if gradient else "word_embeddings") in said[0]


def test_a_folder_that_cannot_be_written_hides_no_cause(tmp_path: Path) -> None:
    (tmp_path / "bad_batches").touch()
    message = r"loss is nan at step \d+; .*examples 17; .*bad_batches.* cannot be written .*; lower optim.lr"
    with pytest.raises(PeftLightningError, match=message):
        fit(METHODS[0], tmp_path, Poison(), keep_bad_batches=True)


def test_large_gradients_are_finite(tmp_path: Path) -> None:
    """Their squares overflow, they do not."""
    module = fit(METHODS[0], tmp_path, Poison(gradient=True, value=1e30), non_finite="skip", gradient_clip_val=None)
    assert module.skipped_steps == 0


def test_the_setting_is_a_switch() -> None:
    with pytest.raises(UsageError, match="keep_bad_batches"):
        build(METHODS[0], optim={"keep_bad_batches": "yes"})


@EVERY
def test_deterministic_mode_gives_the_same_bits_twice(method: type[MethodModule], tmp_path: Path) -> None:
    ends: list[Any] = []
    try:
        for name in ("one", "two"):
            torch.manual_seed(len(ends))  # the state of the process must not matter
            module = build(method)
            source = data(batch_size=8, rows=rows(), method=method)
            options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "deterministic": True}
            trainer(tmp_path / name, **options).fit(module, datamodule=source)
            assert torch.are_deterministic_algorithms_enabled()
            content = torch.load(tmp_path / name / "last.ckpt", weights_only=True)
            ends.append((content["state_dict"], content["optimizer_states"], MetricsCSV(tmp_path / name).read()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert ends[0][2] == ends[1][2]
    assert_close(ends[1][:2], ends[0][:2], rtol=0, atol=0)


class Always(Poison):
    """Every step is bad."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.get("inputs", batch)["input_ids"][0, 1] = UNKNOWN


def test_steps_in_a_row_are_counted_over_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every_n_steps": 1, "max_epochs": 4}
    source = data(batch_size=8, rows=rows())

    def skipping() -> Any:
        return build(METHODS[0], optim={"lr": 1e-3, "non_finite": "skip"})

    trainer(tmp_path, callbacks=[Always()], max_steps=7, **options).fit(skipping(), datamodule=source)
    goes_on = trainer(tmp_path, callbacks=[Always()], **options)
    with pytest.raises(PeftLightningError, match=r"at step 10 \(10 such steps in a row\)"):
        goes_on.fit(skipping(), datamodule=source, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
