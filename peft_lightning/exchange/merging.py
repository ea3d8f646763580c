"""Merging adapters from files: folders of any format in, one folder out, with its recipe and its report.

The folder holds the merged adapter, ``merge.json`` (the recipe in full, the sources with their hashes, the data, the
versions and the figures of every site) and ``merge.png``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_lightning import __version__
from peft_lightning.analysis.merging import draw_merge
from peft_lightning.atomic import fresh_folder
from peft_lightning.backbones.build import BackboneConfig, as_backbone_config, build_backbone, fingerprint
from peft_lightning.errors import UsageError
from peft_lightning.exchange.base import with_pooler
from peft_lightning.exchange.calibrating import Batches, calibration_batches
from peft_lightning.exchange.notes import ExchangeWarning
from peft_lightning.exchange.reading import module_of
from peft_lightning.files.adapterhub import FAMILIES, write_adapterhub
from peft_lightning.files.base_model import note_on_name
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft import write_peft
from peft_lightning.files.manifest import write_adapter
from peft_lightning.files.sources import knows_weights, read_source, source_names
from peft_lightning.layers.merge_config import MergeConfig
from peft_lightning.layers.merging import Merged, MergeSource, merged_config, needs_data
from peft_lightning.layers.merging import merge_adapters as merge_tensors
from peft_lightning.settings import as_config

__all__ = ["MERGE_FORMATS", "merge_adapters"]

MERGE_FORMATS = ("adapterhub", "peft", "peft_lightning")
"""What a merged adapter can be written as."""

_PACKAGES = ("torch", "transformers", "scipy", "POT")


def merge_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    backbone: Any,
    merge: MergeConfig | Mapping[str, Any] = MergeConfig(),
    data: Any = None,
    split: str = "train",
    batch_size: int = 8,
    max_length: int = 128,
    format: str | None = None,
    task: Any = None,
    head: str | None = None,
    allow_bin: bool = False,
) -> dict[str, Any]:
    """Merge pretrained adapters of one backbone into one, and write it.

    Args:
        adapters: folders of AdapterHub's library or PEFT (LoRA), or ours: exported adapters, runs, checkpoints.
        output: a new folder; it appears only when all is written.
        backbone: the model that the adapters were made for; a folder, a hub name, or a ``BackboneConfig``.
        merge: how; see :class:`MergeConfig`.
        data: unlabelled inputs for methods that look at activations, and for output errors in the report: a
            ``TaskDataModule``, or a list of texts.
        split: stage of a data module that is read.
        batch_size: texts of a batch; each adapter reads all of them. A data module has its own.
        max_length: tokens of a text at most. A data module has its own.
        format: one of :data:`MERGE_FORMATS`. None: peft for LoRA; adapterhub for other adapters, or where it has no
            words for the backbone, peft_lightning.
        task: whose head an adapter in our own format begins with; a name of the task table, or a row.
        head: name of the adapter whose head goes along, where all heads have the same labels. None: heads stay behind.
        allow_bin: read pickled tensors (``.bin``); nothing but tensors and plain containers is.

    Returns:
        What ``merge.json`` holds.

    Raises:
        UsageError: if adapters or options do not fit, or there is no data where the method needs some.
        CheckpointError: if a source is damaged, of another backbone, or asks for what is not computed here.
        DataError: if the data cannot be used.
    """
    merge = as_config(MergeConfig, merge)
    config = as_backbone_config(backbone)
    if not adapters:
        raise UsageError("adapters: must be at least one folder")
    names = source_names(adapters)
    if head is not None and head not in names:
        raise UsageError(f"head = {head!r}: must be one of {', '.join(names)}")
    with fresh_folder(output) as folder:
        model = build_backbone(config)
        identity = fingerprint(model)
        options: dict[str, Any] = {"allow_bin": allow_bin, "backbone": model, "fingerprint": identity}
        given = [read_source(path, with_head=head is not None, **options) for path in adapters]
        sources = [
            MergeSource(name=name, adapter=one.adapter, tensors=one.tensors, masks=one.masks)
            for name, one in zip(names, given, strict=True)
        ]
        chosen = _format(format, merged_config(sources, merge).kind, model, task)
        batches, described = _data(data, sources, merge, model, config, split, batch_size, max_length)
        merged = merge_tensors(model.to(_device()), sources, merge, batches)
        taken = None if head is None else _head(head, given, names, config, [Path(path) for path in adapters])
        whole = _foreign(merged, model, config, taken)
        _write(folder, whole, chosen, model, config, task)
        notes = _notes(given, names, model, head)
        record = {
            "versions": {"peft_lightning": __version__} | {name: _version(name) for name in _PACKAGES},
            "format": chosen,
            "adapter": asdict(merged.adapter),
            "backbone": {"name": _short(config), **identity},
            "data": described,
            "head": head,
            "notes": notes,
            **merged.report,
            "sources": [_described(one, name) for name, one in zip(names, given, strict=True)],
        }
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        (folder / "merge.json").write_text(text, encoding="utf-8")
        draw_merge(merged.report, folder / "merge.png")
    for note in notes:
        warnings.warn(note, ExchangeWarning, stacklevel=2)
    return record


def _format(format: str | None, kind: str, backbone: nn.Module, task: Any) -> str:
    """The format that is written.

    Raises:
        UsageError: if it is unknown, or has no words for the adapter.
    """
    model_type = str(getattr(backbone.config, "model_type", ""))
    if format is None:
        format = "peft" if kind == "lora" else "adapterhub" if model_type in FAMILIES else "peft_lightning"
    if format not in MERGE_FORMATS:
        raise UsageError(f"format = {format!r}: must be one of {', '.join(MERGE_FORMATS)}")
    if format == "peft" and kind != "lora":
        raise UsageError(f"format = 'peft': is for LoRA, and the adapters are of kind {kind}")
    if format == "adapterhub" and model_type not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise UsageError(
            f"format = 'adapterhub': is written for {known} only, and the backbone is a {model_type}; "
            "must be peft_lightning, with a task"
        )
    if format == "peft_lightning" and task is None:
        raise UsageError("format = 'peft_lightning': holds a module with a head, so it needs a task (--task)")
    return format


def _data(
    data: Any,
    sources: Sequence[MergeSource],
    merge: MergeConfig,
    model: nn.Module,
    config: BackboneConfig,
    split: str,
    batch_size: int,
    max_length: int,
) -> tuple[Batches | None, dict[str, Any] | None]:
    """Batches where there are some; raises UsageError where there are none and the method needs them, or has no use."""
    if data is None:
        if needs_data(sources, merge):
            raise UsageError(
                f"merge.preset = {merge.preset!r}: needs unlabelled data for activations; give data (--data TASK or "
                "--texts FILE)"
            )
        return None, None
    if sources[0].adapter.kind == "lora":
        raise UsageError("data: LoRA's updates are merged without data; leave it out")
    tokenizer = config.tokenizer_name
    return calibration_batches(data, model, tokenizer, split=split, batch_size=batch_size, max_length=max_length)


def _head(
    head: str, given: Sequence[ForeignAdapter], names: Sequence[str], config: BackboneConfig, paths: Sequence[Path]
) -> ForeignAdapter:
    """The adapter whose head goes along, with the head complete.

    Raises:
        UsageError: if it has none, or another adapter's head has other labels.
    """
    place = list(names).index(head)
    own = given[place]
    if own.head is None:
        raise UsageError(f"head = {head!r}: this adapter has no head")
    for name, other in zip(names, given, strict=True):
        if other.head is not None and _labels(other) != _labels(own):
            raise UsageError(
                f"head = {head!r}: has the labels {_labels(own)}, the head of {name} {_labels(other)}; what adapters "
                "for other labels become together fits neither head: leave it out and train a new one"
            )
    return with_pooler(own, config, paths[place])


def _labels(given: ForeignAdapter) -> str:
    assert given.head is not None
    return ", ".join(given.labels) if given.labels else f"0 to {len(given.head['out.weight']) - 1}"


def _foreign(merged: Merged, model: nn.Module, config: BackboneConfig, head: ForeignAdapter | None) -> ForeignAdapter:
    hf_config: Any = model.config
    return ForeignAdapter(
        adapter=merged.adapter,
        tensors={name: tensor.cpu() for name, tensor in merged.tensors.items()},
        masks={name: mask.cpu() for name, mask in merged.masks.items()},
        head=None if head is None else head.head,
        labels=None if head is None else head.labels,
        base={
            "model_type": hf_config.model_type,
            "hidden_size": hf_config.hidden_size,
            "num_hidden_layers": hf_config.num_hidden_layers,
            "model_name": _short(config),
            "model_class": type(model).__name__,
        },
    )


def _write(
    folder: Path, given: ForeignAdapter, format: str, model: nn.Module, config: BackboneConfig, task: Any
) -> None:
    if format == "adapterhub":
        write_adapterhub(folder, given)
    elif format == "peft":
        write_peft(folder, given, [name for name, _ in model.named_modules() if name])
    else:
        module = module_of(given, task=task, backbone=config, what=Path("the merged adapter"))
        write_adapter(folder, module.owned_state(), module.manifest())


def _notes(given: Sequence[ForeignAdapter], names: Sequence[str], model: nn.Module, head: str | None) -> list[str]:
    """What the user should know, a line each."""
    notes = []
    here = (model.config, type(model))
    for name, one in zip(names, given, strict=True):
        notes += [f"{name}: {note}" for note in (*one.notes, *note_on_name(one, here))]
    if unknown := [name for name, one in zip(names, given, strict=True) if not knows_weights(one.origin)]:
        notes.append(f"{', '.join(unknown)}: made on weights that no file identifies; only the shapes were compared")
    behind = [name for name, one in zip(names, given, strict=True) if one.origin.get("has_head") and name != head]
    if behind:
        notes.append(f"the head{'s' if len(behind) > 1 else ''} of {', '.join(behind)} stay{'s' * (len(behind) == 1)} "
                     "behind")  # fmt: skip
    return notes


def _described(given: ForeignAdapter, name: str) -> dict[str, Any]:
    """A source in the recipe."""
    known = {key: value for key, value in given.origin.items() if value is not None and key != "backbone"}
    known["knows_weights"] = knows_weights(given.origin)
    adapter = {key: getattr(given.adapter, key) for key in ("kind", "bottleneck", "nonlinearity")}
    named = {"model_name": given.base["model_name"]} if given.base.get("model_name") else {}
    return {"name": name, **known, **adapter, "scaling": given.adapter.factor, "masks": bool(given.masks), **named}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _short(config: BackboneConfig) -> str | None:
    """The backbone's name; a folder's place on this machine is nobody else's business."""
    return Path(config.name).name if config.name and Path(config.name).is_dir() else config.name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
