"""From a module, or a file of ours, to a folder that AdapterHub's library, PEFT or transformers reads."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from peft_lightning.atomic import fresh_folder
from peft_lightning.errors import UsageError
from peft_lightning.exchange.notes import ExchangeWarning
from peft_lightning.exchange.reading import head_is_new
from peft_lightning.files.adapterhub import write_adapterhub
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft import write_peft
from peft_lightning.files.manifest import MANIFEST_KEY, read_file, write_adapter
from peft_lightning.loading import load
from peft_lightning.methods.sparse_adapter import SparseAdapterModule
from peft_lightning.pretrain_module import PretrainModule

__all__ = ["FORMATS", "export_adapter"]

FORMATS = ("adapterhub", "peft", "peft_lightning", "transformers")
"""What can be written. The first two can be imported again, ``load`` reads the third, and the last is a whole model."""


def export_adapter(
    source: str | Path | SparseAdapterModule | PretrainModule,
    folder: str | Path,
    *,
    format: str,
    head: bool | None = None,
    backbone: Any = None,
) -> None:
    """Write what a module trained in a format of another library, or as our own adapter folder.

    A pretrained model is written as ``AutoModelForMaskedLM.from_pretrained`` reads it, with its tokenizer.

    Args:
        source: a module, or a checkpoint, run or adapter folder.
        folder: new or empty; it appears only when all is written.
        format: one of :data:`FORMATS`; peft is for LoRA only, transformers for pretrained models only.
        head: whether the head goes along. None: in our own format always; in AdapterHub's unless it is still the new
            one of an import; in PEFT's not, and the file fits the bare model (with True, a
            ``...ForSequenceClassification``).
        backbone: where ``source`` is a path: instead of the backbone's recorded folder or name.

    Raises:
        CheckpointError: if the format has no words for the adapter, or ``source`` cannot be read.
        UsageError: if an option is wrong or the folder holds files.
    """
    if format not in FORMATS:
        raise UsageError(f"format = {format!r}: must be one of {', '.join(FORMATS)}")
    if format == "peft_lightning" and head is False:
        raise UsageError("head = False: format = 'peft_lightning' always has the head")
    module = _module(source, backbone)
    if isinstance(module, PretrainModule) != (format == "transformers"):
        kind, fitting = type(module).__name__, FORMATS[-1:] if isinstance(module, PretrainModule) else FORMATS[:-1]
        raise UsageError(f"format = {format!r}: {kind} can be written as {', '.join(fitting)}")
    if isinstance(module, PretrainModule):
        if head is not None:
            raise UsageError(f"head = {head}: a pretrained model always has its head")
        module.export(folder)
        return
    with fresh_folder(folder) as fresh:
        if format == "peft_lightning":
            write_adapter(fresh, module.owned_state(), module.manifest())
        elif format == "adapterhub":
            write_adapterhub(fresh, _foreign(module, not head_is_new(module) if head is None else head))
        else:
            names = [name for name, _ in module.backbone.named_modules() if name]
            write_peft(fresh, _foreign(module, bool(head)), names)
    if format == "peft" and head is None and not head_is_new(module):
        warnings.warn(f"{folder}: the head stays behind; head = True takes it along", ExchangeWarning, stacklevel=2)


def _module(source: Any, backbone: Any) -> SparseAdapterModule | PretrainModule:
    module = source
    if not isinstance(source, nn.Module):
        run_config = read_file(source)[MANIFEST_KEY].get("run_config")
        module = load(source, backbone=backbone)
        module.run_config = run_config if isinstance(run_config, dict) else {}
    if not isinstance(module, SparseAdapterModule | PretrainModule):
        raise UsageError(
            f"{type(module).__name__}: has no adapters; SparseAdapterModule and SCTDPretrainModule can be exported"
        )
    module.configure_model()
    return module


def _foreign(module: SparseAdapterModule, with_head: bool) -> ForeignAdapter:
    """What a module trained, as plain values."""
    backbone: Any = module.backbone
    state = {
        name.removeprefix("backbone."): tensor.detach().cpu().clone()
        for name, tensor in module.owned_state().items()
        if name.startswith("backbone.")
    }
    head = {name: tensor.detach().cpu().clone() for name, tensor in module.head.state_dict().items()}
    named = module.backbone_config.name
    return ForeignAdapter(
        adapter=module.adapter,
        tensors={name: tensor for name, tensor in state.items() if not name.endswith("_mask")},
        masks={name.removesuffix("_mask"): tensor for name, tensor in state.items() if name.endswith("_mask")},
        prune=asdict(module.prune),
        head=head if with_head else None,
        labels=tuple(module.task.labels) or None,
        base={
            "model_type": backbone.config.model_type,
            "hidden_size": backbone.config.hidden_size,
            "num_hidden_layers": backbone.config.num_hidden_layers,
            # a folder's place on this machine is nobody else's business
            "model_name": Path(named).name if named and Path(named).is_dir() else named,
            "model_class": type(backbone).__name__,
        },
    )
