"""How fast pretraining goes: tokens per second, the share of teacher steps, and how much of a GPU's peak is used.

A module takes part by a method ``work(batch)`` -> ``{"tokens": int, "flops": float, "teacher": bool, "kind": str}``,
the training work of one micro-batch on one rank, from shapes alone. All ranks are taken to do equal work, as batches of
static shape do.

The clock stands still during validation and while a checkpoint is written. It leaves out the first step of either
kind (ordinary, teacher) of a process, which may compile. A GPU computes behind the program's back, so the clock
waits for it when it is read: once every ``every_n_steps``, before a validation and before a checkpoint.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from peft_lightning.errors import UsageError

__all__ = ["Throughput", "peak_flops"]

# Operations per second of dense products. For these, Lightning's table gives those of sparse ones, or lacks the name.
_DENSE: dict[str, dict[str, float]] = {
    "h200": {"float32": 66.9e12, "tfloat32": 494.7e12, "bfloat16": 989.4e12, "float16": 989.4e12},
    "h100 nvl": {"float32": 60e12, "tfloat32": 417.5e12, "bfloat16": 835.5e12, "float16": 835.5e12},
}
_SUMS = ("steps", "teacher_steps", "tokens", "timed_tokens", "timed_flops", "seconds")


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that a GPU reaches at most, or None where that is not known.

    Args:
        device: of the module.
        precision: the trainer's, as ``bf16-mixed``.
    """
    if device.type != "cuda":
        return None
    dtype = {"bf16": "bfloat16", "16": "float16", "32": "float32"}.get(precision.partition("-")[0])
    if dtype is None:
        return None
    ampere = torch.cuda.get_device_capability(device)[0] >= 8
    if dtype == "float32" and ampere and torch.get_float32_matmul_precision() != "highest":
        dtype = "tfloat32"
    name = torch.cuda.get_device_name(device).lower()
    for chip, peaks in _DENSE.items():
        if chip in name:
            return peaks[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no number says it
        return get_available_flops(device, dtype if dtype == "tfloat32" else getattr(torch, dtype))


class Throughput(L.Callback):
    """Logs ``throughput/tokens_per_second``, ``throughput/teacher_share`` and, on a known GPU, ``throughput/mfu``.

    Tokens are those of all ranks; the shares are of optimizer steps. Does nothing for a module without ``work``.

    Args:
        every_n_steps: optimizer steps between two rows of the log, each over the steps since the last.

    Raises:
        UsageError: if ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps = {every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self._total, self._window, self._pending = _zeros(), _zeros(), _zeros()
        self._seen: set[object] = set()  # kinds of steps that this process has done
        self._kind: object = None  # of the step at hand
        self._mark: float | None = None  # when the running clock was read last
        self._works, self._step, self._world = False, 0, 1
        self._device = torch.device("cpu")
        self._peak: float | None = None

    @property
    def totals(self) -> dict[str, float]:
        """Of the whole run: ``steps``, ``teacher_steps``, ``tokens``, ``seconds`` on the clock, and what is logged."""
        sums = {name: self._total[name] + self._window[name] for name in _SUMS}
        plain = {name: sums[name] for name in ("steps", "teacher_steps", "tokens", "seconds")}
        return plain | self._rates(sums) if sums["steps"] else {}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        self._read_clock()
        return {name: self._total[name] + self._window[name] for name in _SUMS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._total = {name: float(state_dict[name]) for name in _SUMS}

    def pause(self) -> None:
        """Stop the clock until the next training batch; for whoever does something else in between."""
        self._read_clock()
        self._mark = None

    # -- hooks -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See what there is to measure."""
        self._works = callable(getattr(pl_module, "work", None))
        self._step, self._world, self._device = trainer.global_step, trainer.world_size, pl_module.device
        self._peak = peak_flops(self._device, str(trainer.precision)) if self._works else None
        self._window, self._pending, self._seen, self._mark = _zeros(), _zeros(), set(), None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add a micro-batch's work, and let the clock run unless the step may compile."""
        if not self._works:
            return
        work = pl_module.work(batch)  # type: ignore[operator]
        self._pending["tokens"] += work["tokens"] * self._world
        self._pending["timed_flops"] += work["flops"]
        self._pending["teacher_steps"] = float(work["teacher"])
        self._kind = work.get("kind", work["teacher"])
        if self._kind not in self._seen:
            self.pause()
        elif self._mark is None:
            self._wait()
            self._mark = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: count it, and log if it is time."""
        if not self._works or trainer.global_step == self._step:
            return
        self._step, done, self._pending = trainer.global_step, self._pending, _zeros()
        done |= {"steps": 1.0, "timed_tokens": done["tokens"]}
        if self._kind not in self._seen:
            done |= {"timed_tokens": 0.0, "timed_flops": 0.0}
            self._seen.add(self._kind)
        _add(self._window, done)
        if self._step % self.every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock until the next training batch."""
        self.pause()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The same."""
        self.pause()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop it for good."""
        self.pause()

    # -- parts -------------------------------------------------------------------------------------------------

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._read_clock()
        rates = self._rates(self._window)
        _add(self._total, self._window)
        self._window = _zeros()
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{name}": value for name, value in rates.items()}, self._step)
        if "tokens_per_second" in rates:
            module.log("tokens/s", rates["tokens_per_second"], prog_bar=True, logger=False)

    def _rates(self, sums: dict[str, float]) -> dict[str, float]:
        rates = {"teacher_share": sums["teacher_steps"] / sums["steps"]}
        if sums["timed_tokens"] and sums["seconds"]:
            rates["tokens_per_second"] = sums["timed_tokens"] / sums["seconds"]
            if self._peak:
                rates["mfu"] = sums["timed_flops"] / sums["seconds"] / self._peak
        return rates

    def _read_clock(self) -> None:
        if self._mark is not None:
            self._wait()
            now = time.monotonic()
            self._window["seconds"] += now - self._mark
            self._mark = now

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _zeros() -> dict[str, float]:
    return dict.fromkeys(_SUMS, 0.0)


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name in _SUMS:
        sums[name] += more[name]
