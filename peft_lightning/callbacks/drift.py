"""Follows how far corrupted text drifts from the original in pretraining, into ``drift.json`` and ``drift.png``.

What is measured, and how we read the paper, is in :mod:`peft_lightning.analysis.drift`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from peft_lightning.analysis.drift import drift_scores, drift_sums
from peft_lightning.analysis.encoder import FrozenEncoder
from peft_lightning.analysis.plots import Curve, draw_curves
from peft_lightning.atomic import atomic_write
from peft_lightning.callbacks.throughput import Throughput
from peft_lightning.errors import UsageError

__all__ = ["Drift"]

_NONE = torch.iinfo(torch.int64).max  # stands for a block that a rank does not have


class Drift(L.Callback):
    """Measures at the start and every so many optimizer steps, on the first blocks of the validation split.

    The blocks and their corruption are the same every time and on any number of ranks, of which each measures its own.
    Training goes on as if nothing had happened: random numbers and modes are put back.

    Args:
        every_n_steps: optimizer steps between two measurements.
        rows: how many blocks; all, if the split has fewer.
        encoder: folder or hub name of a sentence encoder, or None for the model's own measure alone.

    Raises:
        UsageError: if a number is too small, or, when training starts, if there is no validation split.
    """

    def __init__(self, every_n_steps: int, rows: int = 64, encoder: str | None = None) -> None:
        for name, value, least in (("every_n_steps", every_n_steps, 1), ("rows", rows, 2)):
            if value < least:
                raise UsageError(f"{name} = {value}: must be at least {least}")
        self.every_n_steps, self.rows, self.encoder = every_n_steps, rows, encoder
        self.series: list[dict[str, float]] = []
        self.validation: list[dict[str, float]] = []
        self._batches: list[dict[str, Tensor]] = []
        self._outside: FrozenEncoder | None = None
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        """The series so far."""
        return {"series": [dict(row) for row in self.series], "validation": [dict(row) for row in self.validation]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.series = [dict(row) for row in state_dict["series"]]
        self.validation = [dict(row) for row in state_dict["validation"]]

    # -- hooks -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the blocks; measure if it is time and a checkpoint does not bring this step's measure."""
        if not all(hasattr(pl_module, name) for name in ("engine", "choose", "drops")):
            raise UsageError(f"Drift: measures pretraining, and {type(pl_module).__name__} does not pretrain")
        self._step = trainer.global_step
        with _untouched(pl_module):
            if self.encoder is not None and self._outside is None:
                self._outside = FrozenEncoder(self.encoder, device=pl_module.device)
            self._batches = self._choose(trainer)
        known = any(row["step"] == self._step for row in self.series)
        if self._step % self.every_n_steps == 0 and not known:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after an optimizer step, if it is time."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every_n_steps == 0:
                self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation's results, the other curve of the paper's figure."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.validation.append({"step": trainer.global_step, **found})
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the blocks and the encoder go."""
        self._batches, self._outside = [], None

    # -- parts -------------------------------------------------------------------------------------------------

    def _choose(self, trainer: L.Trainer) -> list[dict[str, Tensor]]:
        """This rank's share of the first ``rows`` blocks, in batches as they come."""
        data = getattr(trainer, "datamodule", None)
        loader = trainer.val_dataloaders if data is None else data.val_dataloader()
        if loader is None or not trainer.enable_validation:
            raise UsageError("Drift: needs a validation split; give one, or leave the callback out")
        batches: list[dict[str, Tensor]] = []
        numbers: list[int] = []
        for batch in _blocks(loader):
            batches.append(batch)
            numbers += batch["rows"][batch["valid"].bool()].tolist()
            if len(numbers) >= self.rows:
                break
        mine = torch.tensor((sorted(numbers) + [_NONE] * self.rows)[: self.rows], device=trainer.strategy.root_device)
        everyone: Any = trainer.strategy.all_gather(mine)
        last = int(everyone.flatten().sort().values[self.rows - 1])
        chosen = [{**batch, "valid": batch["valid"].bool() & (batch["rows"] <= last)} for batch in batches]
        return [batch for batch in chosen if batch["valid"].any()]

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.pause()
        with _untouched(module), trainer.precision_plugin.forward_context():
            found = [drift_sums(module, _to(batch, module.device), self._outside) for batch in self._batches]
        sums = self._over_ranks(trainer, found)
        scores = drift_scores(sums)
        self.series.append({"step": trainer.global_step, **scores})
        for logger in trainer.loggers:
            logger.log_metrics({f"drift/{name}": value for name, value in scores.items()}, trainer.global_step)
        self._write(trainer)

    @staticmethod
    def _over_ranks(trainer: L.Trainer, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sums = {name: torch.stack([part[name] for part in found]).sum(dim=0) for name in (found[0] if found else ())}
        if trainer.world_size == 1:
            return sums
        # a rank without blocks does not know the measures' names and sizes: all exchange what they have
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, {name: total.cpu() for name, total in sums.items()})
        parts = [part for part in everyone if part]
        return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.default_root_dir)
        report = {"rows": self.rows, "encoder": self.encoder, **self.state_dict()}
        text = json.dumps(report, indent=2) + "\n"
        atomic_write(folder / "drift.json", lambda file: file.write(text.encode()))
        if panels := _panels(self.series, self.validation):
            title = "cosine of corrupted and original text, and what dropping adds"
            draw_curves(panels, folder / "drift.png", across="optimizer steps", title=title)


def _panels(series: list[dict[str, float]], validation: list[dict[str, float]]) -> dict[str, dict[str, Curve]]:
    """What can be drawn: lines, so of two points at least."""
    panels: dict[str, dict[str, Curve]] = {}
    gaps: dict[str, Curve] = {}
    for kind, title in (("own_", "the model itself"), ("text_", "the sentence encoder")):
        names = [name for name in (series[0] if len(series) > 1 else ()) if name.startswith(kind)]
        if names:
            panels[f"cosine, by {title}"] = {name.removeprefix(kind): _curve(series, name) for name in names}
        if {f"{kind}full", f"{kind}dropped"} <= set(names):
            gap = [{"step": row["step"], "gap": row[f"{kind}full"] - row[f"{kind}dropped"]} for row in series]
            gaps[title] = _curve(gap, "gap")
    if gaps:
        panels["gap: full less dropped"] = gaps
    # named as the passes are, so that a pass has one colour in all panels
    losses = {"val/loss": "full", "val/dropped_loss": "dropped"}
    found = {label: _curve(validation, name) for name, label in losses.items() if name in (validation or [{}])[0]}
    if found and len(validation) > 1:
        panels["validation loss"] = found
    return panels


def _curve(rows: list[dict[str, float]], name: str) -> Curve:
    there = [row for row in rows if name in row]
    values = [row[name] for row in there]
    return Curve(x=[row["step"] for row in there], mean=values, low=values, high=values)


def _blocks(loader: Any) -> Iterator[dict[str, Tensor]]:
    loaders: Iterable[Any] = loader if isinstance(loader, list | tuple) else [loader]
    for part in loaders:
        yield from part


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


@contextmanager
def _untouched(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; modes and random numbers are as before afterwards."""
    modes = {part: part.training for part in module.modules()}
    with torch.random.fork_rng(), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
