"""From a foreign folder to a module, strictly: facts of the base model first, then tensors both ways."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig, as_backbone_config
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.exchange.base import base_model, with_pooler
from peft_lightning.exchange.notes import ExchangeWarning
from peft_lightning.files.base_model import check_base, check_sites, note_on_name
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.manifest import MANIFEST_KEY
from peft_lightning.files.sources import foreign_reader
from peft_lightning.files.strict import check_tensors
from peft_lightning.layers.adapters import AdapterConfig
from peft_lightning.methods.sparse_adapter import PruneConfig, SparseAdapterModule
from peft_lightning.task_module import TaskModule

__all__ = ["head_is_new", "import_adapter", "module_of"]

_RECORD = "imported"


def import_adapter(
    folder: str | Path,
    *,
    task: Any,
    backbone: Any,
    allow_bin: bool = False,
    new_head: bool = False,
    **options: Any,
) -> SparseAdapterModule:
    """A module from a folder that AdapterHub's library or PEFT wrote; it can be used, trained, saved and exported.

    Args:
        folder: has ``adapter_config.json`` and the tensors; the format is recognised.
        task: name of a row of the task table, or a row.
        backbone: the model that the adapter was made for; a folder, a hub name, or a ``BackboneConfig``.
        allow_bin: read pickled tensors (``.bin``); nothing but tensors and plain containers is.
        new_head: pass over the folder's head and begin with a new one.
        options: further arguments of :class:`SparseAdapterModule`, such as ``optim``. ``max_length`` is the usual one,
            or the backbone's number of positions where that is smaller.

    Returns:
        The module, in evaluation mode. Warnings say what was not taken over, and that
        a head is new.

    Raises:
        CheckpointError: if the folder is damaged, asks for what is not computed here, or belongs to another backbone.
        UsageError: if an option is wrong, or only pickled tensors are there and ``allow_bin`` is False.
    """
    folder = Path(folder)
    if taken := sorted({"adapter", "prune"} & options.keys()):
        raise UsageError(f"{taken[0]}: the folder decides this; leave the option out")
    config = as_backbone_config(backbone)
    here, read = base_model(config), _reader(folder)
    given = read(
        folder, allow_bin=allow_bin, with_head=not new_head, check=lambda facts: check_base(facts, here, folder)
    )
    check_sites(given, here, folder)
    given = with_pooler(given, config, folder)
    module = module_of(given, task=task, backbone=config, what=folder, **options)
    notes = [*given.notes, *note_on_name(given, here)]
    if given.head is None:
        notes.append("the head is new, so train it before use")
        module.run_config = {**module.run_config, _RECORD: {"new_head": _digest(module.head)}}
    for note in notes:
        warnings.warn(f"{folder}: {note}", ExchangeWarning, stacklevel=2)
    return module.eval()


def module_of(
    given: ForeignAdapter, *, task: Any, backbone: BackboneConfig, what: Path, **options: Any
) -> SparseAdapterModule:
    """A module that holds an adapter given as plain values, and its head, or a new one where it has none.

    Args:
        given: the adapter.
        task: name of a row of the task table, or a row.
        backbone: the model that the adapter was made for.
        what: for messages.
        options: as of :func:`import_adapter`.

    Raises:
        CheckpointError: if tensors, masks or classes do not fit.
        UsageError: if an option is wrong.
    """
    style = "dense" if given.head is None or "dense.weight" in given.head else "linear"
    if given.head is not None and options.get("head", style) != style:
        raise UsageError(f"head = {options['head']!r}: the folder's head is {style!r}; leave the option out")
    prune, adapter = _settings(given, what)
    module = SparseAdapterModule(
        task=task, backbone=backbone, adapter=adapter, prune=prune, **{"head": style, **options}
    )
    _check_classes(given, module, what)
    module.configure_model()
    if "max_length" not in options:  # what fits a large backbone may be too long for this one
        module.max_length = min(module.max_length, module.positions() or module.max_length)
        module.record(max_length=module.max_length)
    _fill(module, given, what)
    return module


def head_is_new(module: TaskModule) -> bool:
    """Whether the head is still the random one that an import began with."""
    record = module.run_config.get(_RECORD)
    return isinstance(record, dict) and record.get("new_head") == _digest(module.head)


def _reader(folder: Path) -> Any:
    """The reader of the format that a folder is in."""
    if folder.is_dir() and (folder / "manifest.json").exists():
        raise UsageError(f"{folder}: is an adapter of peft_lightning already; load() reads it")
    return foreign_reader(folder)


def _settings(given: ForeignAdapter, folder: Path) -> tuple[PruneConfig, AdapterConfig]:
    """How the masks were made, as far as the folder says it, and the adapter that was made so.

    Without masks nothing is removed. Masks of which nothing is recorded are "given": the share is counted.
    """
    total = sum(tensor.numel() for name, tensor in given.tensors.items() if not name.endswith("bias"))
    removed = sum(int((~mask).sum()) for mask in given.masks.values())
    if not given.masks or not (removed or given.prune):
        return PruneConfig(sparsity=0.0), given.adapter
    if not given.prune:
        return PruneConfig(sparsity=removed / total, score="given"), given.adapter
    wrong = f"{folder}: the record of how its masks were made does not belong to them"
    try:
        prune = PruneConfig(**given.prune)
    except (TypeError, UsageError) as error:
        raise CheckpointError(f"{wrong} ({error})") from None
    # Each tensor may round its own share. The masks of an adapter before its fit are not made yet, and keep all.
    if removed and prune.multiplier == 1 and abs(removed - prune.share * total) > len(given.masks):
        raise CheckpointError(f"{wrong}: sparsity = {prune.share}, and {removed} of {total} weights are removed")
    inner, left = divmod(given.adapter.bottleneck, prune.multiplier)
    if left or not inner:
        raise CheckpointError(
            f"{wrong}: multiplier = {prune.multiplier}, and the bottleneck is {given.adapter.bottleneck}"
        )
    return prune, replace(given.adapter, bottleneck=inner)


def _check_classes(given: ForeignAdapter, module: SparseAdapterModule, folder: Path) -> None:
    """As many classes as the task has; in another order they would answer wrongly without a word."""
    labels, outputs = module.task.labels, module.kind.num_outputs
    if given.head is not None and given.head["out.weight"].shape[0] != outputs:
        raise CheckpointError(
            f"{folder}: its head has {given.head['out.weight'].shape[0]} outputs, the task {module.task.name} has "
            f"{outputs}; import with a new head (--new_head)"
        )
    named = given.labels or labels
    if set(named) == set(labels) and tuple(named) != tuple(labels):
        raise CheckpointError(
            f"{folder}: the head's classes are in the order {', '.join(named)}, the task's in the order "
            f"{', '.join(labels)}; give the task with its labels in the head's order"
        )


def _fill(module: SparseAdapterModule, given: ForeignAdapter, folder: Path) -> None:
    """Load the tensors through the module's own strict path, as from a checkpoint."""
    own = {name: tensor.detach() for name, tensor in module.owned_state().items()}
    new: dict[str, Tensor] = {f"backbone.{name}": tensor for name, tensor in given.tensors.items()}
    if given.head is None:
        new |= {name: tensor for name, tensor in own.items() if name.startswith("head.")}
    else:
        new |= {f"head.{name}": tensor for name, tensor in given.head.items()}
    for name, tensor in own.items():
        if name.endswith("_mask"):
            path = name.removeprefix("backbone.").removesuffix("_mask")
            new[name] = given.masks.get(path, torch.ones_like(tensor))
    check_tensors(new, own, str(folder))
    module.on_load_checkpoint({"state_dict": new, MANIFEST_KEY: module.manifest()})
    module.load_state_dict(new)


def _digest(head: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
