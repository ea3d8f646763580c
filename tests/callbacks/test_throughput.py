"""Tokens per second against a clock that the test turns, with everything that must not count in between."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from peft_lightning.callbacks import throughput
from peft_lightning.callbacks.log import MetricsCSV
from peft_lightning.callbacks.throughput import Throughput, peak_flops
from peft_lightning.errors import UsageError
from tests.toy import trainer

TOKENS, FLOPS = 24, 6e9  # of a micro-batch


class Clock:
    """Stands still unless it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(throughput, "time", found)
    return found


class Worker(L.LightningModule):
    """Every fourth optimizer step is a teacher step, which takes three seconds; the others take one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.linear, self.clock = torch.nn.Linear(4, 1), clock

    @property
    def teacher(self) -> bool:
        return (self.trainer.global_step + 1) % 4 == 0

    def work(self, batch: Any) -> dict[str, Any]:
        return {"tokens": TOKENS, "flops": FLOPS, "teacher": self.teacher}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += 3 if self.teacher else 1
        return self.linear(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.clock.now += 500

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.now += 7000  # the disk

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Idle(Worker):
    work = None  # type: ignore[assignment]


def loader(batches: int = 40) -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(2 * batches, 4), batch_size=2)  # type: ignore[arg-type]


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Step -> what was logged."""
    rows = MetricsCSV(folder).read()
    return {
        int(row["step"]): {name: float(value) for name, value in row.items() if name.startswith("throughput/")}
        for row in rows
        if any(name.startswith("throughput/") for name in row)
    }


@pytest.mark.parametrize("group", [1, 2])
def test_windows_leave_out_validation_checkpoints_and_first_steps(clock: Clock, tmp_path: Path, group: int) -> None:
    found = Throughput(4)
    fit = trainer(
        tmp_path,
        every_n_steps=3,
        max_steps=12,
        val_check_interval=5,
        limit_val_batches=1,
        accumulate_grad_batches=group,
        callbacks=[found],
    )
    fit.fit(Worker(clock), loader(), loader())
    assert clock.now > 7000  # there were validations and checkpoints
    rows = logged(tmp_path)
    assert list(rows) == [4, 8, 12]
    # steps 1 and 4 are the first of their kind; a teacher step takes three times as long
    for step, rate in ((4, TOKENS), (8, 4 * TOKENS / 6), (12, 4 * TOKENS / 6)):
        assert rows[step] == pytest.approx({"throughput/tokens_per_second": rate, "throughput/teacher_share": 0.25})
    assert found.totals == pytest.approx(
        {
            **{"steps": 12, "teacher_steps": 3, "tokens": 12 * group * TOKENS, "seconds": group * 14},
            **{"teacher_share": 0.25, "tokens_per_second": 10 * TOKENS / 14},
        }
    )
    assert fit.progress_bar_metrics["tokens/s"] == pytest.approx(4 * TOKENS / 6)


def test_time_between_batches_counts(clock: Clock, tmp_path: Path) -> None:
    class Slow(Worker):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.clock.now += 0.5  # before the batch starts
            return batch

    found = Throughput(100)
    trainer(tmp_path, every_n_steps=100, max_steps=3, callbacks=[found]).fit(Slow(clock), loader())
    # the clock starts with step 2, after its batch was made ready
    assert found.totals["seconds"] == pytest.approx(1 + 1.5)


@pytest.mark.parametrize("first", [True, False])
def test_whoever_does_something_else_says_so(clock: Clock, tmp_path: Path, first: bool) -> None:
    found = Throughput(100)

    class Look(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            found.pause()
            clock.now += 90

    callbacks = [Look(), found] if first else [found, Look()]
    trainer(tmp_path, every_n_steps=100, max_steps=3, callbacks=callbacks).fit(Worker(clock), loader())
    assert found.totals["seconds"] == pytest.approx(2)
    assert found.totals["tokens_per_second"] == pytest.approx(TOKENS)


def test_a_run_that_goes_on_keeps_counting(clock: Clock, tmp_path: Path) -> None:
    whole = Throughput(4)
    trainer(tmp_path / "whole", max_steps=11, callbacks=[whole]).fit(Worker(clock), loader())
    for steps in (6, 11):
        part = Throughput(4)
        last = tmp_path / "parts" / "last.ckpt"
        trainer(tmp_path / "parts", max_steps=steps, callbacks=[part]).fit(
            Worker(clock), loader(), ckpt_path=str(last) if last.exists() else None, weights_only=True
        )
    for name in ("steps", "teacher_steps", "tokens", "teacher_share"):
        assert part.totals[name] == whole.totals[name]
    # each process leaves out its own first steps: 7 and 8 in the second
    assert part.totals["seconds"] == whole.totals["seconds"] - 1 - 3
    assert list(logged(tmp_path / "parts")) == [4, 8]


def test_a_module_without_work_is_left_alone(clock: Clock, tmp_path: Path) -> None:
    found = Throughput(1)
    trainer(tmp_path, max_steps=3, callbacks=[found]).fit(Idle(clock), loader())
    assert found.totals == {} and logged(tmp_path) == {}


def test_all_ranks_and_the_share_of_the_peak(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 60e9)
    rows: list[Any] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics)))
    fake: Any = SimpleNamespace(global_step=0, world_size=8, precision="bf16-mixed", loggers=[logger])
    module: Any = SimpleNamespace(
        device=torch.device("cpu"),
        work=lambda batch: {"tokens": TOKENS, "flops": FLOPS, "teacher": False},
        log=lambda *args, **options: None,
    )
    found = Throughput(3)
    found.on_train_start(fake, module)
    for step in (1, 2, 3):
        found.on_train_batch_start(fake, module, None, step)
        clock.now += 0.25
        fake.global_step = step
        found.on_train_batch_end(fake, module, None, None, step)
    ((step, metrics),) = rows
    assert step == 3
    assert metrics == pytest.approx(
        {
            "throughput/tokens_per_second": 8 * TOKENS / 0.25,
            "throughput/teacher_share": 0.0,
            "throughput/mfu": FLOPS / 0.25 / 60e9,  # of one rank's work on one device
        }
    )


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 NVL", "bf16-mixed", 835.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("Tesla T4", "16-mixed", 65e12),
        ("A chip of tomorrow", "bf16-mixed", None),
        ("NVIDIA H200", "64-true", None),
    ],
)
def test_peaks(name: str, precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peak_flops(torch.device("cuda", 0), precision) == peak
        assert peak_flops(torch.device("cpu"), precision) is None


def test_every_n_steps_is_at_least_one() -> None:
    with pytest.raises(UsageError, match="every_n_steps = 0: must be at least 1"):
        Throughput(0)
