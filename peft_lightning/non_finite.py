"""Steps whose loss or gradient is not finite: skipped and counted, or the end; and what is said and kept of them.

All ranks decide alike, since they look at a loss and a flag that are reduced over all of them. Where a loss is not
finite, the micro-batches of the step are run once more, without gradients and with the same dropout, to find the first
submodule whose output is not, and the examples for which it is not. A gradient is said by the first parameter that it
belongs to; it may be any of the step's examples.

With a loss scaler (16-mixed) gradients that overflow are its business: it skips the step and lowers the scale.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from peft_lightning.atomic import atomic_write
from peft_lightning.errors import PeftLightningError
from peft_lightning.seeding import step_seed
from peft_lightning.sharding import through

__all__ = ["REMEDY", "FiniteGuard"]

REMEDY = "lower optim.lr, raise optim.warmup or clip gradients (trainer.gradient_clip_val)"
_MOST_IN_A_ROW = 10
_MOST_FILES = 10
_MOST_NAMED = 12
_log = logging.getLogger(__name__)


class FiniteGuard:
    """Looks at each step of a module, as its ``optim.non_finite`` and ``optim.keep_bad_batches`` say.

    Args:
        module: a method's module.
    """

    def __init__(self, module: Any) -> None:
        self._module = [module]  # in a list, or it would become its own submodule
        self.skipped = self.in_a_row = 0
        self._batches: list[tuple[int, Any]] = []

    def begin(self) -> None:
        """Forget the micro-batches of a step that was interrupted, or is over."""
        self._batches = []

    def remember(self, batch: Any, number: int) -> None:
        """Keep a micro-batch until the step that it belongs to is over."""
        self._batches.append((number, batch))

    def looked(self, loss: Tensor) -> tuple[float, bool]:
        """The loss of a step, the mean over all ranks, and whether it and the gradients of all of them are finite.

        Args:
            loss: this rank's, a scalar.
        """
        module = self._module[0]
        bad = torch.zeros_like(loss)
        gradients = [gradient for _, gradient in _gradients(module)]
        if gradients and not self._scaled:
            largest = torch.stack([norm.to(loss) for norm in torch._foreach_norm(gradients, math.inf)])
            bad = (~torch.isfinite(largest)).any().to(loss)
        value, flag = module.trainer.strategy.reduce(torch.stack([loss, bad]), reduce_op="mean").tolist()
        finite = math.isfinite(value) and flag == 0
        self.in_a_row = 0 if finite else self.in_a_row + 1
        return value, finite

    def refuse(self, loss: float, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Stop, or see to it that the optimiser changes neither weights nor moments. Called on all ranks.

        Raises:
            PeftLightningError: names the step, the examples and the tensor where it begins.
        """
        module = self._module[0]
        stops, again = module.optim.non_finite == "stop", ""
        if not stops and self.in_a_row >= _MOST_IN_A_ROW:
            stops, again = True, f" ({_MOST_IN_A_ROW} such steps in a row)"
        tensor, rows = self._cause(loss)
        what = f"the training loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        said = f"{what} at step {step}{again}; it begins in {tensor}, examples {_listed(rows)}"
        if module.optim.keep_bad_batches:
            said += self._keep(step, {"loss": str(loss), "tensor": tensor, "examples": json.dumps(rows)})
        if stops:
            skip = "" if again else ", or go on with optim.non_finite skip (--resume changed)"
            raise PeftLightningError(f"{said}; {REMEDY}{skip}")
        if module.trainer.is_global_zero:
            _log.warning("%s; the step is skipped", said)
        for parameter in module.trainable_parameters().values():
            if self._scaled and optimizer.defaults.get("fused") and parameter.grad is not None:
                parameter.grad.fill_(torch.inf)  # which the scaler finds and passes over; it must find something
            else:
                parameter.grad = None
        self.skipped += 1

    @property
    def _scaled(self) -> bool:
        return getattr(self._module[0].trainer.precision_plugin, "scaler", None) is not None

    # -- where it begins -----------------------------------------------------------------------------------------

    def _cause(self, loss: float) -> tuple[str, list[int]]:
        """The name of the tensor where it begins, and the numbers of the examples, of all ranks."""
        module = self._module[0]
        if math.isfinite(loss):
            bad = (name for name, gradient in _gradients(module) if not torch.isfinite(gradient).all())
            name = next(bad, None)
            found = None if name is None else f"the gradient of {name}", [r for _, b in self._batches for r in _rows(b)]
        else:
            found = self._bad_forward()
        everywhere = _gathered(found, module.trainer)
        first = next((tensor for tensor, _ in everywhere if tensor is not None), "the loss")
        return first, sorted({row for _, rows in everywhere for row in rows})

    def _bad_forward(self) -> tuple[str | None, list[int]]:
        module = self._module[0]
        first, rows = None, list[int]()
        for number, batch in self._batches:
            name, output, value = _first_bad_output(module, partial(self._again, batch, number))
            if name is None and torch.isfinite(value):
                continue
            first = first or name
            rows += _bad_rows(_rows(batch), output)
        return first, rows

    def _again(self, batch: Any, number: int) -> Tensor:
        """The loss of a micro-batch, as it was."""
        module = self._module[0]
        torch.manual_seed(step_seed(module.seed, module.current_epoch, number, module.global_rank))
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            found: Tensor = through(module.trainer.strategy, module.training_step, batch, number)
        return found

    # -- the bad batch -------------------------------------------------------------------------------------------

    def _keep(self, step: int, facts: dict[str, str]) -> str:
        """Write the step's micro-batches of all ranks into one file of tensors; what is to be said of it."""
        trainer = self._module[0].trainer
        folder = Path(getattr(trainer, "default_root_dir", None) or ".") / "bad_batches"
        mine = [dict(_flat(batch)) for _, batch in self._batches]
        everything = _gathered(mine, trainer)
        said = _written(folder, step, everything, facts) if trainer.is_global_zero else ""
        text: str = trainer.strategy.broadcast(said)
        return text


def _written(folder: Path, step: int, everything: list[list[dict[str, Any]]], facts: dict[str, str]) -> str:
    """Write batches, by rank and number, and what was found out; what is to be said of it."""
    path = folder / f"step-{step}.safetensors"
    if folder.is_dir() and len(list(folder.iterdir())) >= _MOST_FILES:
        return f"; {folder} holds {_MOST_FILES} batches already"
    tensors: dict[str, Tensor] = {}
    for rank, batches in enumerate(everything):
        for number, batch in enumerate(batches):
            for name, value in batch.items():
                key = f"rank{rank}.batch{number}.{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    facts[key] = json.dumps(value, default=str)
    content = save(tensors, {"step": str(step), **facts})
    try:
        atomic_write(path, lambda file: file.write(content))
    except OSError as error:
        return f"; {path} cannot be written ({error.strerror})"
    return f"; the batch is in {path}"


def _gradients(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and gradient of what trains; of a sharded one this rank's part."""
    for name, parameter in module.trainable_parameters().items():
        if parameter.grad is not None and parameter.grad.numel():
            gradient = parameter.grad.detach()
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if local.numel():
                yield name, local


def _first_bad_output(module: nn.Module, run: Callable[[], Tensor]) -> tuple[str | None, Tensor | None, Tensor]:
    """The first submodule to give an output that is not finite, that output, and what ``run`` returns."""
    found: list[tuple[str, Tensor]] = []

    def look(name: str, output: Any) -> None:
        for tensor in _tensors(output):
            if not found and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                found.append((name, tensor.detach()))

    handles = [
        part.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
        for name, part in module.named_modules()
        if name
    ]
    try:
        value = run()
    finally:
        for handle in handles:
            handle.remove()
    name, output = found[0] if found else (None, None)
    return name, output, value


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _rows(batch: Any) -> list[int]:
    """The numbers of a batch's examples in their split, if it says them."""
    rows = batch.get("rows") if isinstance(batch, Mapping) else None
    return [int(row) for row in rows] if rows is not None else []


def _bad_rows(rows: list[int], output: Tensor | None) -> list[int]:
    """Those of a batch's rows for which an output is not finite; all where it is not by rows."""
    if output is None or output.ndim < 1 or len(output) != len(rows):
        return rows
    bad = (~torch.isfinite(output.reshape(len(output), -1))).any(dim=1).tolist()
    return [row for row, is_bad in zip(rows, bad, strict=True) if is_bad]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value.detach().cpu().contiguous().clone() if isinstance(value, Tensor) else value


def _gathered(value: Any, trainer: Any) -> list[Any]:
    """What all ranks have, by rank."""
    if trainer.world_size == 1:
        return [value]
    everything: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everything, value)
    return everything


def _listed(rows: list[int]) -> str:
    if not rows:
        return "without numbers"
    more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
    return ", ".join(map(str, rows[:_MOST_NAMED])) + more
