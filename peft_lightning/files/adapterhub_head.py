"""Classification heads as AdapterHub's library keeps them beside an adapter, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_lightning.errors import CheckpointError
from peft_lightning.files.foreign import read_json, read_tensors
from peft_lightning.files.values import check_finite

__all__ = ["head_config", "head_tensors", "read_head"]

_HEAD = {"dense": 2, "linear": 1}  # our styles and their number of layers
_FLEX = {"1": "dense", "4": "out"}
_STATIC = {"RobertaForSequenceClassification": {"classifier.dense": "dense", "classifier.out_proj": "out"}}


def read_head(folder: Path, allow_bin: bool) -> tuple[dict[str, Tensor] | None, tuple[str, ...] | None]:
    """A head's tensors under our names and its classes in order; None for what the folder does not have or say.

    Args:
        folder: an adapter's.
        allow_bin: whether a pickle may be read.

    Raises:
        CheckpointError: if it is damaged, incomplete, or not one of ours.
        UsageError: if only a pickle is there and ``allow_bin`` is False.
    """
    names = ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin")
    if not any((folder / name).exists() for name in names):
        return None, None
    what = folder / "head_config.json"
    config = read_json(what)
    given = read_tensors(folder, "model_head.safetensors", "pytorch_model_head.bin", allow_bin)
    check_finite(given, folder)
    flex = config.get("config")
    if isinstance(flex, dict):
        layers = _check_flex(flex, what)
        numbers = _FLEX if layers == 2 else {"1": "out"}
        parts = {f"heads.{config.get('name')}.{number}": part for number, part in numbers.items()}
        label2id = flex.get("label2id")
    elif config.get("model_class") in tuple(_STATIC):
        parts, label2id = _STATIC[config["model_class"]], config.get("label2id")
    else:
        raise CheckpointError(
            f"{what}: model_class = {str(config.get('model_class'))[:100]!r}: this head is not ours (a head of two "
            "layers and tanh, or of one); import with a new head (--new_head)"
        )
    expected = {f"{old}.{kind}": f"{part}.{kind}" for old, part in parts.items() for kind in ("weight", "bias")}
    if given.keys() != expected.keys():
        raise CheckpointError(
            f"{folder}: the head's tensors differ from head_config.json; missing: "
            f"{', '.join(sorted(expected.keys() - given.keys())) or 'none'}; unexpected: "
            f"{', '.join(sorted(given.keys() - expected.keys())) or 'none'}"
        )
    return {expected[name]: tensor for name, tensor in given.items()}, _labels(label2id)


def _check_flex(config: dict[str, Any], what: Path) -> int:
    table: dict[str, tuple[Any, ...]] = {
        "head_type": ("classification",),
        "layers": tuple(_HEAD.values()),
        "use_pooler": (False,),
        "bias": (True,),
    }
    if config.get("layers") == 2:
        table["activation_function"] = ("tanh",)
    defaults = {"use_pooler": False, "bias": True}
    for key, values in table.items():
        value = config.get(key, defaults.get(key))
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise CheckpointError(
                f"{what}: {key} = {str(value)[:100]}: this head is not ours ({key} must be "
                f"{' or '.join(map(str, values))}); import with a new head (--new_head)"
            )
    return int(config["layers"])


def _labels(label2id: Any) -> tuple[str, ...] | None:
    """The classes in order, where the file names them (LABEL_0 is no name)."""
    if not isinstance(label2id, dict) or not all(type(i) is int for i in label2id.values()):
        return None
    names = tuple(sorted(label2id, key=lambda name: label2id[name]))
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return None if generic or sorted(label2id.values()) != list(range(len(names))) else names


def head_config(head: Mapping[str, Tensor], labels: tuple[str, ...] | None) -> dict[str, Any]:
    """The ``config`` section of one of our heads.

    Args:
        head: its tensors under our names.
        labels: the classes in order, where they are known.
    """
    count = head["out.weight"].shape[0]
    names = labels if labels and len(labels) == count else [f"LABEL_{i}" for i in range(count)]
    layers = 2 if "dense.weight" in head else 1
    return {
        "activation_function": "tanh" if layers == 2 else None,
        "bias": True,
        "dropout_prob": None,
        "head_type": "classification",
        "label2id": {name: i for i, name in enumerate(names)},
        "layers": layers,
        "num_labels": count,
        "use_pooler": False,
    }


def head_tensors(head: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A head's tensors under AdapterHub's names, for the adapter ``name``."""
    back = {"dense": "1", "out": "4" if "dense.weight" in head else "1"}
    return {f"heads.{name}.{back[key.partition('.')[0]]}.{key.partition('.')[2]}": t for key, t in head.items()}
