"""From a module that Prune-LoRA trained to an ordinary model of transformers, and to a folder of one.

The model is pruned, in float32, with LoRA folded in. Where the architecture's ``...ForSequenceClassification`` computes
what our head does, it is that one; elsewhere it is the bare model, and the head's tensors lie beside it in
``head.safetensors`` under our names (``dense``, tanh, ``out``, on the text's token).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from peft_lightning.backbones.pooling import pooling
from peft_lightning.backbones.tokenizers import load_tokenizer, tokenizer_files
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.exchange.skeleton import MODEL_FILE, classes_of, say_classes, skeleton, tensors_of
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft import classifier_names, write_peft
from peft_lightning.files.pruned import PrunedRecord, write_pruned
from peft_lightning.layers.adapters import AdapterConfig
from peft_lightning.methods.prune_lora import PruneLoRAModule

__all__ = ["plain_model", "record_of", "write_lora", "write_model", "write_tokenizer"]

_HEAD = "head.safetensors"


def plain_model(module: PruneLoRAModule, *, head: bool, least: int = 0) -> Any:
    """A new, ordinary model that computes what a module does: pruned, LoRA folded in, float32, in evaluation mode.

    Args:
        module: has decided what goes; it is not changed. A backbone held in bfloat16 is converted first, so that sums
            are not rounded.
        head: whether it is the architecture's ``...ForSequenceClassification``, where that one computes the same.
        least: 0, or 1: attentions that lost all heads get one of zeros, which changes nothing.
    """
    backbone: Any = module.backbone
    assert module.plan is not None
    kept = {path: numbers or tuple(range(least)) for path, numbers in module.plan.heads.items()}
    # ranks are LoRA's, which is gone
    plan = replace(module.plan, heads=kept, ranks=dict.fromkeys(module.plan.ranks, 1))
    config = copy.deepcopy(backbone.config)
    config.name_or_path, config.dtype = "", torch.float32
    state, names = _folded(module), _fitting_head(module) if head else {}
    if names:
        say_classes(config, module.kind.num_outputs, module.task.labels)
    model = skeleton(config, bool(names), plan)
    if names:
        state = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in state.items()}
        state |= {names[ours]: tensor for ours, tensor in _trained_head(module).items()}
    state |= {name: torch.zeros_like(t) for name, t in model.state_dict().items() if not state[name].numel()}
    model.load_state_dict(state)
    model.config.architectures = [type(model).__name__]
    return model


def record_of(module: PruneLoRAModule, kind: str, model_class: str) -> PrunedRecord:
    """What ``pruned.json`` says of a module."""
    setting = module.backbone_config
    name = setting.name
    is_folder = name is not None and Path(name).is_dir()
    assert module.plan is not None
    return PrunedRecord(
        kind=kind,
        model_class=model_class,
        plan=module.plan,
        outputs=module.kind.num_outputs,
        labels=tuple(module.task.labels),
        backbone=module.backbone_fingerprint,
        source={
            # a folder's place on this machine is nobody else's business
            "name": Path(str(name)).name if is_folder else name,
            "folder": is_folder,
            "config": setting.config,
            "revision": setting.revision,
            "dtype": setting.dtype,
            "seed": module.seed,
        },
    )


def write_model(folder: Path, module: PruneLoRAModule, head: bool) -> list[str]:
    """Write a whole model: ``config.json``, ``model.safetensors``, the tokenizer's files, and ``pruned.json``.

    Args:
        folder: exists.
        module: has decided what goes.
        head: whether the head goes along.

    Returns:
        Notes for the user, one line each.
    """
    model = plain_model(module, head=head)
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(model).items()}
    (folder / MODEL_FILE).write_bytes(save_safetensors(tensors, metadata={"format": "pt"}))
    model.config.to_json_file(folder / "config.json")
    files, notes = [MODEL_FILE, "config.json"], write_tokenizer(folder, module)
    if head and not _fitting_head(module) and _trained_head(module):
        trained = {name: tensor.contiguous() for name, tensor in _trained_head(module).items()}
        (folder / _HEAD).write_bytes(save_safetensors(trained))
        files.append(_HEAD)
        notes.append(
            f"the head is beside the model in {_HEAD}: transformers has none for {model.config.model_type} that "
            "computes the same"
        )
    write_pruned(folder, record_of(module, "model", type(model).__name__), files)
    return notes


def write_lora(folder: Path, module: PruneLoRAModule, head: bool) -> None:
    """Write LoRA and the trained norms in PEFT's format, for the pruned backbone that ``pruned.json`` tells of.

    Args:
        folder: exists.
        module: has decided what goes.
        head: whether the head goes along; what is written then fits a ``...ForSequenceClassification``.

    Raises:
        CheckpointError: if the format has no words for the head, or no attention has a head left.
    """
    backbone: Any = module.backbone
    if head and not _fitting_head(module):
        raise CheckpointError(
            f"backbone of type {backbone.config.model_type!r}: its sequence classifier in transformers does not "
            "compute what this head does; export without the head"
        )
    record = record_of(module, "adapter", list(classes_of(backbone.config))[head])
    state = {
        name.removeprefix("backbone."): tensor.detach().cpu().clone()
        for name, tensor in module.owned_state().items()
        if name.startswith("backbone.")
    }
    name = next((path.rpartition(".")[2] for path in module.loras), AdapterConfig().name)
    given = ForeignAdapter(
        adapter=AdapterConfig(kind="lora", scaling=module.lora.scaling, name=name),
        tensors={key: tensor for key, tensor in state.items() if ".loras." in key},
        head=_trained_head(module) if head else None,
        base={
            "model_type": backbone.config.model_type,
            "model_name": record.source["name"],
            "model_class": type(backbone).__name__,
        },
    )
    paths = [path for path, _ in backbone.named_modules() if path and ".loras" not in path]
    write_peft(folder, given, paths, {key: tensor for key, tensor in state.items() if ".loras." not in key})
    write_pruned(folder, record)


def write_tokenizer(folder: Path, module: PruneLoRAModule) -> list[str]:
    """Write the files of a module's tokenizer.

    Returns:
        A note if it cannot be loaded.
    """
    try:
        tokenizer = load_tokenizer(module.tokenizer_name)
    except UsageError as error:
        return [f"the tokenizer stays behind ({error})"]
    for name, text in tokenizer_files(tokenizer, module.positions()).items():
        (folder / name).write_text(text, encoding="utf-8")
    return []


def _folded(module: PruneLoRAModule) -> dict[str, Tensor]:
    """The backbone's tensors in float32 with every B A in its weights; copies."""
    state = {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in module.backbone.state_dict().items()
        if ".loras." not in name
    }
    for path, lora in module.loras.items():
        linear = nn.Linear(1, 1, bias=False, device="meta")  # stands for the one in the backbone, which stays as it is
        linear.weight = nn.Parameter(state[f"{path.partition('.loras.')[0]}.weight"])
        copy.deepcopy(lora).cpu().merge(linear)
    return state


def _trained_head(module: PruneLoRAModule) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu() for name, tensor in module.head.state_dict().items()}


def _fitting_head(module: PruneLoRAModule) -> dict[str, str]:
    """Our names of the head's tensors -> theirs in the architecture's sequence classifier; empty if it differs."""
    config: Any = module.backbone.config
    fits = module.kind.classifies and pooling(config) == "first"
    return classifier_names(config.model_type, module.head.state_dict()) if fits else {}
