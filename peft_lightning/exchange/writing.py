"""From a module, or a file of ours, to a folder that AdapterHub's library, PEFT, transformers or onnxruntime reads."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from peft_lightning.atomic import fresh_folder
from peft_lightning.errors import UsageError
from peft_lightning.exchange.notes import ExchangeWarning
from peft_lightning.exchange.onnx import write_onnx
from peft_lightning.exchange.plain import write_lora, write_model
from peft_lightning.exchange.reading import head_is_new
from peft_lightning.files.adapterhub import write_adapterhub
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft import write_peft
from peft_lightning.files.manifest import MANIFEST_KEY, read_file, write_adapter
from peft_lightning.loading import load
from peft_lightning.methods.fusion import FusionModule
from peft_lightning.methods.mera import MerAModule
from peft_lightning.methods.prune_lora import PruneLoRAModule
from peft_lightning.methods.sparse_adapter import SparseAdapterModule
from peft_lightning.pretrain_module import PretrainModule

__all__ = ["FORMATS", "export_adapter"]

_FITTING: dict[type[nn.Module], tuple[str, ...]] = {
    SparseAdapterModule: ("adapterhub", "peft", "peft_lightning"),
    MerAModule: ("adapterhub", "peft", "peft_lightning"),
    FusionModule: ("peft_lightning",),
    PruneLoRAModule: ("peft", "peft_lightning", "transformers", "onnx"),
    PretrainModule: ("transformers",),
}
_HEADLESS = "the head stays behind; to take it along, set head (command line: with, Python: True)"
FORMATS = tuple(dict.fromkeys(name for names in _FITTING.values() for name in names))
"""What can be written. ``load`` reads our own (peft_lightning), ``import_adapter`` the first two of SparseAdapter and
MerA, and ``load_pruned`` what Prune-LoRA wrote for PEFT and transformers."""

_Exportable = SparseAdapterModule | MerAModule | FusionModule | PruneLoRAModule | PretrainModule


def export_adapter(
    source: str | Path | _Exportable,
    folder: str | Path,
    *,
    format: str,
    head: bool | None = None,
    backbone: Any = None,
) -> None:
    """Write what a module trained in a format of another library, or as our own adapter folder.

    A pretrained model is written as ``AutoModelForMaskedLM.from_pretrained`` reads it, with its tokenizer. A pruned
    model is written whole for transformers, with LoRA folded in, or as LoRA for PEFT, and ``load_pruned`` gives the
    ordinary model back; or for onnxruntime as ``model.onnx``.

    Args:
        source: a module, or a checkpoint, run or adapter folder.
        folder: new or empty; it appears only when all is written.
        format: one of :data:`FORMATS`; peft is for LoRA only, transformers and onnx for whole models.
        head: whether the head goes along. None: in our own format and in ONNX always; in AdapterHub's unless it is
            still the new one of an import; with a pruned model for transformers yes, in a file of its own where
            transformers has no such head; in PEFT's not, and the file fits the bare model (with True, a
            ``...ForSequenceClassification``).
        backbone: where ``source`` is a path: instead of the backbone's recorded folder or name.

    Raises:
        CheckpointError: if the format has no words for the adapter, or ``source`` cannot be read.
        UsageError: if an option is wrong, the folder holds files, or nothing was decided yet that could be written.
    """
    if format not in FORMATS:
        raise UsageError(f"format = {format!r}: must be one of {', '.join(FORMATS)}")
    if format in ("peft_lightning", "onnx") and head is False:
        raise UsageError(f"head = False: format = {format!r} always has the head")
    module = _module(source, backbone)
    fitting = next(names for kind, names in _FITTING.items() if isinstance(module, kind))
    if format not in fitting:
        kind = type(module).__name__
        raise UsageError(f"format = {format!r}: {kind} can be written as {', '.join(fitting)}")
    if isinstance(module, PretrainModule):
        if head is not None:
            raise UsageError(f"head = {head}: a pretrained model always has its head")
        module.export(folder)
        return
    if isinstance(module, MerAModule):
        module.require_merged("export")
    if isinstance(module, PruneLoRAModule) and module.plan is None:
        raise UsageError("PruneLoRAModule: has not decided yet what goes; fit it first, or give importance.file")
    with fresh_folder(folder) as fresh:
        notes = _write(fresh, module, format, head)
    for note in notes:
        warnings.warn(f"{folder}: {note}", ExchangeWarning, stacklevel=2)


def _write(
    fresh: Path,
    module: SparseAdapterModule | MerAModule | FusionModule | PruneLoRAModule,
    format: str,
    head: bool | None,
) -> list[str]:
    """Fill the folder; returns what the user should know."""
    if format == "peft_lightning" or isinstance(module, FusionModule):
        write_adapter(fresh, module.owned_state(), module.manifest())
        return []
    if isinstance(module, SparseAdapterModule | MerAModule):
        is_new = head_is_new(module)
        if format == "adapterhub":
            goes = not is_new and module.kind.classifies if head is None else head
            write_adapterhub(fresh, _foreign(module, goes))
            return []
        names = [name for name, _ in module.backbone.named_modules() if name]
        write_peft(fresh, _foreign(module, bool(head)), names)
        return [_HEADLESS] if head is None and not is_new else []
    if format == "transformers":
        return write_model(fresh, module, head is not False)
    if format == "onnx":
        return write_onnx(fresh, module)
    write_lora(fresh, module, bool(head))
    return [_HEADLESS] if head is None else []


def _module(source: Any, backbone: Any) -> _Exportable:
    module = source
    if not isinstance(source, nn.Module):
        run_config = read_file(source)[MANIFEST_KEY].get("run_config")
        module = load(source, backbone=backbone)
        module.run_config = run_config if isinstance(run_config, dict) else {}
    if not isinstance(module, _Exportable):
        raise UsageError(
            f"{type(module).__name__}: has no adapters; SparseAdapterModule, MerAModule, FusionModule, PruneLoRAModule "
            "and SCTDPretrainModule can be exported"
        )
    module.configure_model()
    return module


def _foreign(module: SparseAdapterModule | MerAModule, with_head: bool) -> ForeignAdapter:
    """What a module trained, as plain values.

    Raises:
        UsageError: if a head is to go along that is no classifier of texts.
    """
    if with_head and not module.kind.classifies:
        raise UsageError(f"head = True: other libraries have no words for the head of kind {module.task.kind}")
    assert module.adapter is not None
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
        prune=asdict(module.prune) if isinstance(module, SparseAdapterModule) else {},
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
