"""A pruned model with its head as ONNX, for onnxruntime: token numbers in, fp32 logits out, any batch and length.

Shapes: B rows, L tokens, H width, C outputs.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.pooling import pooling
from peft_lightning.backbones.quiet import quiet
from peft_lightning.errors import UsageError, first_line
from peft_lightning.exchange.plain import plain_model, record_of, write_tokenizer
from peft_lightning.files.pruned import write_pruned
from peft_lightning.methods.prune_lora import PruneLoRAModule

__all__ = ["write_onnx"]

_FILE = "model.onnx"
_NEEDED = ("onnx", "onnxscript")


def write_onnx(folder: Path, module: PruneLoRAModule) -> list[str]:
    """Write ``model.onnx``, the tokenizer's files, and ``pruned.json``.

    Its inputs are ``input_ids`` and ``attention_mask``, and ``token_type_ids`` where the backbone tells types apart,
    all int64 ``[B, L]``; its output is ``logits``.

    Args:
        folder: exists.
        module: has decided what goes; it is not changed.

    Returns:
        Notes for the user, one line each.

    Raises:
        UsageError: if the exporter's packages are missing, or it cannot take this architecture.
    """
    if lacking := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"format = 'onnx': needs {' and '.join(lacking)}, not installed here; pip install 'peft-lightning[onnx]'"
        )
    if not module.kind.classifies:
        raise UsageError(f"format = 'onnx': is for classifiers of texts; the task is of kind {module.task.kind}")
    model = plain_model(module, head=False, least=1)  # the format has no tensors of size 0
    answers = _Answers(model, copy.deepcopy(module.head).float().cpu()).eval()
    names = ["input_ids", "attention_mask"]
    takes_types = "token_type_ids" in inspect.signature(type(model).forward).parameters
    if takes_types and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    try:
        with _silent(), torch.no_grad():
            traced = _traced(answers, names)
            axes = dict.fromkeys(names, {0: "batch", 1: "tokens"})
            program: Any = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=axes,
                verbose=False,
            )
            program.save(folder / _FILE)
    except Exception as error:  # the exporter raises many kinds for what it cannot take
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        kind = model.config.model_type
        raise UsageError(f"format = 'onnx': a {kind} so pruned cannot be exported ({reason[:300]})") from error
    notes = write_tokenizer(folder, module)
    written = [path.name for path in sorted(folder.iterdir()) if path.name.startswith(_FILE)]
    write_pruned(folder, record_of(module, "onnx", type(model).__name__), written)
    return notes


def _traced(answers: nn.Module, names: list[str]) -> torch.export.ExportedProgram:
    """The function as a graph, for any batch and length; another batch shows that nothing of the first one stays in it.

    The example has padding: without any, transformers leaves the mask out.
    """
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    traced = torch.export.export(answers, _example(names, 2, 6, 2), dynamic_shapes=dict.fromkeys(names, any_size))
    for shape in ((3, 9, 4), (2, 5, 0)):
        example = _example(names, *shape)
        torch.testing.assert_close(traced.module()(*example), answers(*example), rtol=1e-4, atol=1e-4)
    return traced


def _example(names: list[str], rows: int, length: int, padding: int) -> tuple[Tensor, ...]:
    """Tokens 1, 2, ...; the last row ends in padding."""
    ids_BL = torch.arange(1, rows * length + 1).view(rows, length) % 11 + 1
    mask_BL = torch.ones_like(ids_BL)
    if padding:
        mask_BL[-1, -padding:] = 0
    parts = {"input_ids": ids_BL, "attention_mask": mask_BL, "token_type_ids": torch.zeros_like(ids_BL)}
    return tuple(parts[name] for name in names)


class _Answers(nn.Module):
    """Backbone and head as one function of tensors."""

    def __init__(self, backbone: Any, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.last = pooling(backbone.config) == "last"

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """int64 ``[B, L]`` each -> logits ``[B, C]``."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden_BLH = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        if self.last:
            places_BL = attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
            last_B11 = places_BL.argmax(dim=1)[:, None, None]
            hidden_BLH = hidden_BLH.gather(1, last_B11.expand(-1, 1, hidden_BLH.shape[2]))
        logits_BC: Tensor = self.head(hidden_BLH)
        return logits_BC


@contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's progress, advice and warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with quiet(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
