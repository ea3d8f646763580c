"""From a folder of a pruned model back to an ordinary model of transformers, strictly.

A folder of the format transformers holds a *whole model*; beside LoRA in PEFT's format there is none, and the *base* is
built from the whole backbone, pruned as the folder says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lightning.backbones.build import BackboneConfig, as_backbone_config, build_backbone, fingerprint
from peft_lightning.backbones.families import FAMILIES
from peft_lightning.errors import CheckpointError, UsageError, first_line
from peft_lightning.exchange.skeleton import MODEL_FILE, classes_of, say_classes, skeleton, tensors_of
from peft_lightning.files.foreign import read_json
from peft_lightning.files.pruned import PrunedRecord, check_digests, read_pruned
from peft_lightning.files.strict import check_fingerprint, check_tensors
from peft_lightning.files.values import check_finite
from peft_lightning.layers.plan import apply_plan
from peft_lightning.reading.limits import read_safetensors
from peft_lightning.seeding import seeded_on_cpu

__all__ = ["load_pruned"]

# What a configuration could have fetched or run, or is about a place.
_NOT_TAKEN = ("attn_implementation", "experts_implementation", "auto_map", "quantization_config", "name_or_path")


def load_pruned(path: str | Path, backbone: Any = None) -> Any:
    """An ordinary model of transformers from a folder that ``export`` wrote of a pruned model.

    From the format transformers it is the whole model, LoRA folded in. From the format peft it is the pruned backbone
    before LoRA; ``peft.PeftModel.from_pretrained(model, path)`` adds what was trained. Nothing in the folder is run.

    Args:
        path: the folder.
        backbone: for the format peft, where the whole backbone is now, if it is not where the file says: a folder, a
            hub name, or a ``BackboneConfig``.

    Returns:
        The model in float32, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: if the folder is damaged, or its parts or the backbone do not fit; says what differs.
        UsageError: if ``backbone`` is missing, cannot be built, or is given for a whole model.
    """
    folder = Path(path)
    record = read_pruned(folder)
    if record.kind == "onnx":
        raise UsageError(f"{folder}: holds a model for onnxruntime; the formats transformers and peft can be loaded")
    check_digests(folder, record)
    if record.kind == "adapter":
        return _base(folder, record, backbone)
    if backbone is not None:
        raise UsageError(f"backbone = {backbone!r}: {folder} is a whole model; leave the option out")
    return _whole(folder, record)


def _whole(folder: Path, record: PrunedRecord) -> Any:
    config = _config(folder, record)
    classes = list(classes_of(config))
    if record.model_class not in classes:
        raise CheckpointError(f"{folder}: model_class = {record.model_class[:100]!r}: must be {' or '.join(classes)}")
    headed = classes.index(record.model_class) == 1
    try:
        model = skeleton(config, headed, record.plan)
    except UsageError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # whatever a wrong configuration leads to, it means the same
        raise CheckpointError(f"{folder / 'config.json'}: makes no model ({first_line(error)})") from None
    if headed and config.num_labels != record.outputs:
        raise CheckpointError(f"{folder}: pruned.json has {record.outputs} outputs, config.json {config.num_labels}")
    try:
        given = read_safetensors(folder / MODEL_FILE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MODEL_FILE}: damaged ({first_line(error)})") from None
    check_tensors(given, tensors_of(model), str(folder))
    check_finite(given, folder)
    model.load_state_dict(given, strict=False)  # what is missing now is tied to what is not
    return model


def _config(folder: Path, record: PrunedRecord) -> Any:
    """The configuration, of the shape that the backbone had."""
    from transformers import AutoConfig

    path = folder / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{path}: model_type = {str(model_type)[:100]!r}: must be one of {', '.join(FAMILIES)}")
    taken = {name: value for name, value in values.items() if name[:1] != "_" and name not in _NOT_TAKEN}
    try:
        config = AutoConfig.for_model(**taken)
    except Exception as error:  # transformers raises many kinds for a wrong value
        raise CheckpointError(f"{path}: is no configuration ({first_line(error)})") from None
    shape = {name: value for name, value in record.backbone.items() if name != "weights"}
    check_fingerprint(shape, {name: getattr(config, name, None) for name in shape}, str(path))
    depth = sum(getattr(config, count) for _, count in FAMILIES[model_type].stacks)
    if depth != len(record.plan.ranks):  # before so many are built
        raise CheckpointError(f"{path}: has {depth} layers, the plan in {folder} {len(record.plan.ranks)}")
    return config


def _base(folder: Path, record: PrunedRecord, given: Any) -> Any:
    """The pruned backbone before LoRA, under a new head where the folder has a trained one."""
    seed = record.source["seed"] % 2**63
    setting = _setting(folder, record, given)
    try:
        with seeded_on_cpu(seed):
            backbone: Any = build_backbone(setting)
    except UsageError as error:  # which calls it by the name of a module's option
        raise UsageError(str(error).replace("backbone.name = ", "backbone = ", 1)) from error
    check_fingerprint(record.backbone, fingerprint(backbone), str(folder))
    classes = classes_of(backbone.config)
    if record.model_class not in classes:
        raise CheckpointError(f"{folder}: model_class = {record.model_class[:100]!r}: must be {' or '.join(classes)}")
    try:
        apply_plan(backbone, record.plan, None)
    except UsageError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    backbone.float()
    if record.model_class == type(backbone).__name__:
        return backbone.eval()
    config = copy.deepcopy(backbone.config)
    say_classes(config, record.outputs, record.labels)
    with seeded_on_cpu(seed):
        model: Any = classes[record.model_class](config)
    if hasattr(model.base_model, "pooler"):
        backbone.pooler = model.base_model.pooler
    setattr(model, model.base_model_prefix, backbone)
    return model.eval()


def _setting(folder: Path, record: PrunedRecord, given: Any) -> BackboneConfig:
    """Which backbone to build."""
    source: Mapping[str, Any] = record.source
    if isinstance(given, str | Path):
        if str(given).startswith(("/", ".", "~")) and not Path(given).is_dir():
            raise UsageError(f"backbone = {str(given)!r}: there is no such folder")
        return BackboneConfig(name=str(given), dtype=source["dtype"])
    if given is not None:
        return as_backbone_config(given)
    if source["folder"] and not Path(str(source["name"])).is_dir():
        raise UsageError(
            f"backbone: {folder} was made on a folder named {source['name']!r}; say where it is (backbone=...)"
        )
    recorded = {name: source[name] for name in ("name", "config", "revision", "dtype")}
    if isinstance(recorded["config"], dict) and "vocab_size" in record.backbone:
        # its size may have come from a tokenizer, which is not needed here
        recorded["config"] = {**recorded["config"], "vocab_size": record.backbone["vocab_size"]}
    return BackboneConfig(**recorded)
