"""AdapterHub's folders, read and written without its library: adapters of BERT and RoBERTa, and their heads.

The names of the tensors are ours (or ours theirs): ``encoder.layer.0.output.adapters.NAME.adapter_up.weight`` and
``encoder.layer.0.attention.self.query.loras.NAME.lora_A``, with ``bert.`` or ``roberta.`` before them where the model
they were saved from had a head. Facts from adapters 1.3.0 (src/adapters: loading, utils, head_utils, heads/base);
files of its predecessors are read too (renamed tensors, inverse adapters that were written but never used).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_safetensors
from torch import Tensor

from peft_lightning.errors import CheckpointError
from peft_lightning.files.adapterhub_config import from_config, to_config
from peft_lightning.files.adapterhub_head import head_config, head_tensors, read_head
from peft_lightning.files.foreign import ForeignAdapter, read_json, read_masks, read_tensors, write_folder
from peft_lightning.files.values import check_finite
from peft_lightning.layers.adapters import AdapterConfig

__all__ = ["FAMILIES", "read_adapterhub", "write_adapterhub"]

FAMILIES = {"bert": "Bert", "roberta": "Roberta"}
"""The ``model_type`` of the models whose adapters are read and written, with the stem of their classes' names."""

# The format that is written is this version's; a reader takes a file without a known version for an old one.
_VERSION = "adapters.1.3.0"
_LEGACY = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")
_GROUPS = r"\.(?:adapters|loras)\."
_TENSOR = re.compile(
    r"encoder\.layer\.(?P<layer>\d{1,6})\."
    r"((?P<place>(?:attention\.)?output)\.adapters\.(?P<name>[^.]+)\.(?P<part>adapter_down\.0|adapter_up)\.(?P<kind>weight|bias)"
    r"|(?P<matrix>attention\.self\.(?:query|key|value)|intermediate\.dense|output\.dense)"
    r"\.loras\.(?P<lora>[^.]+)\.(?P<AB>lora_[AB]))"
)


def read_adapterhub(
    folder: str | Path,
    *,
    allow_bin: bool = False,
    with_head: bool = True,
    check: Callable[[dict[str, Any]], object] | None = None,
) -> ForeignAdapter:
    """Read an adapter, its head where there is one, and the masks beside it.

    Args:
        folder: has ``adapter_config.json`` and ``adapter.safetensors`` or ``pytorch_adapter.bin``.
        allow_bin: read the latter; of a pickle only tensors and plain containers are.
        with_head: False passes over a head.
        check: called with what is known of the base model (``base``) before anything else is read in detail.

    Raises:
        CheckpointError: if it is damaged, incomplete, or asks for something that is not computed here.
        UsageError: if only a pickle is there and ``allow_bin`` is False.
    """
    folder = Path(folder)
    what = folder / "adapter_config.json"
    config = read_json(what)
    model_type = config.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise CheckpointError(
            f"{what}: model_type = {str(model_type)[:100]!r}: AdapterHub's names are known here for "
            f"{' and '.join(FAMILIES)} only"
        )
    hidden = config.get("hidden_size")
    if type(hidden) is not int or not 1 <= hidden < 1e9:
        raise CheckpointError(f"{what}: hidden_size = {str(hidden)[:100]}: must be a whole number of at least 1")
    given = read_tensors(folder, "adapter.safetensors", "pytorch_adapter.bin", allow_bin)
    renamed = [(_LEGACY.sub(".adapters.", name).removeprefix(f"{model_type}."), t) for name, t in given.items()]
    tensors = dict(renamed)
    if len(tensors) != len(given):
        raise CheckpointError(f"{folder}: has two tensors of one name, one of them under its old name")
    depth = _depth(config, tensors)
    base = {"model_type": model_type, "hidden_size": hidden, "num_hidden_layers": depth}
    if check is not None:
        check(base)
    check_finite(given, folder)
    notes = _inverse(config, tensors, str(what))
    adapter, more = from_config(config, depth, str(what))
    masks, prune = read_masks(folder, tensors)
    tensors = _checked(tensors, str(config.get("name")), adapter, hidden, folder)
    masks = {_with_name(name, adapter.name): mask for name, mask in masks.items()}
    head, labels = read_head(folder, allow_bin) if with_head else (None, None)
    _check_head(head or {}, hidden, folder)
    return ForeignAdapter(
        adapter=adapter,
        tensors=tensors,
        masks=masks,
        prune=prune,
        head=head,
        labels=labels,
        base=base,
        notes=(*notes, *more),
    )


def write_adapterhub(folder: str | Path, given: ForeignAdapter) -> None:
    """Write an adapter, its head if it has one, and the masks beside it.

    Args:
        folder: made if needed.
        given: ``base`` has model_type, hidden_size, num_hidden_layers and model_name.

    Raises:
        CheckpointError: if the format has no words for it.
    """
    base = given.base
    if base["model_type"] not in FAMILIES:
        raise CheckpointError(
            f"backbone of type {base['model_type']!r}: AdapterHub's format is written for {' and '.join(FAMILIES)} only"
        )
    if given.adapter.kind == "mam":
        raise CheckpointError(
            "adapter.kind = 'mam': AdapterHub's format keeps the prefixes of all layers in one reparametrised pool, "
            "which ours are not; houlsby, pfeiffer, parallel and lora can be written"
        )
    stem, name = FAMILIES[base["model_type"]], given.adapter.name
    places, left_out = _places(given)
    inner = next(t.shape[0] for key, t in given.tensors.items() if key.endswith(("adapter_down.0.weight", "lora_A")))
    common = {
        "hidden_size": base["hidden_size"],
        "model_class": f"{stem}Model" if given.head is None else f"{stem}AdapterModel",
        "model_name": base.get("model_name"),
        "model_type": base["model_type"],
        "name": name,
        "version": _VERSION,
    }
    prefix = "" if given.head is None else f"{base['model_type']}."
    files: dict[str, Any] = {
        "adapter_config.json": {
            **common,
            "config": to_config(given.adapter, places, left_out, base["hidden_size"], inner),
        },
        "adapter.safetensors": save_safetensors({prefix + key: t for key, t in given.tensors.items()}),
    }
    if given.head is not None:
        files["head_config.json"] = {**common, "config": head_config(given.head, given.labels)}
        files["model_head.safetensors"] = save_safetensors(head_tensors(given.head, name))
    write_folder(Path(folder), files, given.masks, given.prune)


# -- the adapter ----------------------------------------------------------------------------------------------------


def _inverse(config: dict[str, Any], tensors: dict[str, Tensor], what: str) -> list[str]:
    """Old task adapters claim an inverse adapter that they never had; a real one cannot be represented."""
    section = config.get("config")
    claimed = next(
        (k for k in ("inv_adapter", "invertible_adapter") if isinstance(section, dict) and section.get(k)), None
    )
    found = [name for name in tensors if "invertible_" in name]
    if claimed is None and not found:
        return []
    if found or config.get("type") != "text_task":
        value = section[claimed] if claimed and isinstance(section, dict) else None
        raise CheckpointError(
            f"{what}: {claimed or 'inv_adapter'} = {value}: inverse adapters cannot be represented here"
        )
    return [f"{claimed} is not taken over: this file has no such tensors, and its task adapter never used any"]


def _depth(config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Number of the base model's layers, as far as the file tells."""
    section = config.get("config")
    left_out = section.get("leave_out") if isinstance(section, dict) else None
    numbers = [layer for layer in left_out if type(layer) is int] if isinstance(left_out, list) else []
    numbers += [int(found["layer"]) for name in tensors if (found := _TENSOR.fullmatch(name))]
    return min(max(numbers, default=-1) + 1, 10_000)


def _checked(
    tensors: dict[str, Tensor], name: str, adapter: AdapterConfig, hidden: int, folder: Path
) -> dict[str, Tensor]:
    """The tensors under the adapter's new name; shapes and places are those of the configuration."""
    inner = adapter.bottleneck
    shapes = {
        "adapter_down.0.weight": (inner, hidden),
        "adapter_down.0.bias": (inner,),
        "adapter_up.weight": (hidden, inner),
        "adapter_up.bias": (hidden,),
    }
    wrong = []
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None or name not in (found["name"], found["lora"]):
            wrong.append(f"{key} is no tensor of the adapter {name!r}")
        elif adapter.target is not None and not re.search(adapter.target, re.split(_GROUPS, key)[0]):
            wrong.append(f"{key} is where the configuration has no adapter")
        elif found["lora"]:
            rank = tensor.shape[0 if found["AB"] == "lora_A" else -1] if tensor.ndim == 2 else None
            if rank != inner:
                wrong.append(f"{key} {tuple(tensor.shape)} has not the rank {inner}")
        else:
            want = shapes[f"{found['part']}.{found['kind']}"]
            if tuple(tensor.shape) != want:
                wrong.append(f"{key} {tuple(tensor.shape)}, expected {want}")
    weights = [key for key in tensors if not key.endswith("bias")]
    if wrong or not weights:
        listed = "; ".join(sorted(wrong)[:4]) or ("there are biases only" if tensors else "there are none")
        many = f"{len(wrong)} tensors" if wrong else "the tensors"
        raise CheckpointError(f"{folder}: {many} differ from adapter_config.json: {listed}")
    return {_with_name(key, adapter.name): tensor for key, tensor in tensors.items()}


def _check_head(head: dict[str, Tensor], hidden: int, folder: Path) -> None:
    """A head reads states of the base model's width."""
    classes = head["out.bias"].shape[0] if "out.bias" in head and head["out.bias"].ndim else 0
    wanted = {"dense.weight": (hidden, hidden), "dense.bias": (hidden,), "out.weight": (classes, hidden)}
    for name, tensor in head.items():
        if tuple(tensor.shape) != (shape := wanted.get(name, (classes,))):
            raise CheckpointError(f"{folder}: {name} of its head is {tuple(tensor.shape)}, expected {shape}")


def _with_name(key: str, name: str) -> str:
    return re.sub(r"\.(adapters|loras)\.[^.]+\.", lambda found: f".{found[1]}.{name}.", key, count=1)


def _places(given: ForeignAdapter) -> tuple[list[str], list[int]]:
    """Places within a layer, the same in all layers that have any, and the layers that have none."""
    by_layer: dict[int, set[str]] = {}
    for key in given.tensors:
        found = _TENSOR.fullmatch(key)
        if found is None:
            raise CheckpointError(f"{key}: AdapterHub's format has no adapter there")
        by_layer.setdefault(int(found["layer"]), set()).add(found["place"] or found["matrix"])
    first = next(iter(by_layer.values()))
    if any(places != first for places in by_layer.values()):
        raise CheckpointError(
            "adapter.target chooses other places in some layers than in others: AdapterHub's format can leave out "
            "whole layers only"
        )
    return sorted(first), [layer for layer in range(given.base["num_hidden_layers"]) if layer not in by_layer]
