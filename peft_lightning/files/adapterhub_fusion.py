"""AdapterHub's AdapterFusion folders, read without its library.

A folder has ``adapter_fusion_config.json`` and ``model_adapter_fusion.safetensors`` (adapters 1.3.0,
src/adapters/loading.py), and nothing of the adapters that it fuses: these have folders of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from peft_lightning.errors import CheckpointError
from peft_lightning.files.foreign import read_json, read_tensors
from peft_lightning.files.values import check_finite

__all__ = ["ForeignFusion", "read_fusion"]

# What layers/fusion.py computes; other values mean another formula.
_COMPUTED = {
    "key": True,
    "query": True,
    "value": True,
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
    "value_before_softmax": True,
}
_TENSOR = re.compile(
    r"(?P<site>encoder\.layer\.\d{1,6}\.(?:attention\.)?output)\.adapter_fusion_layer\.(?P<name>[^.]+)"
    r"\.(?P<part>query\.weight|query\.bias|key\.weight|key\.bias|value\.weight)"
)


@dataclass(frozen=True, kw_only=True)
class ForeignFusion:
    """What a folder says.

    Attributes:
        names: of the adapters, in their order.
        tensors: by name inside the bare backbone, ``SITE.adapter_fusion_layer.NAMES.query.weight`` and so on.
        sites: submodules that have a fusion, from the first layer to the last.
        base: model_type and hidden_size of the backbone.
        dropout: of the scores; None where the file leaves it to the backbone.
    """

    names: tuple[str, ...]
    tensors: dict[str, Tensor]
    sites: tuple[str, ...]
    base: dict[str, object]
    dropout: float | None


def read_fusion(folder: str | Path, *, allow_bin: bool = False) -> ForeignFusion:
    """Read a fusion.

    Args:
        folder: of AdapterHub's library.
        allow_bin: read ``pytorch_model_adapter_fusion.bin`` too; of a pickle only tensors and plain containers are.

    Raises:
        CheckpointError: if it is damaged or incomplete, or asks for something that is not computed here.
        UsageError: if only a pickle is there and ``allow_bin`` is False.
    """
    folder = Path(folder)
    what = folder / "adapter_fusion_config.json"
    config = read_json(what)
    section, hidden, model_type = config.get("config"), config.get("hidden_size"), config.get("model_type")
    names = config.get("adapter_names") or str(config.get("name", "")).split(",")
    whole = isinstance(section, dict) and type(hidden) is int and hidden > 0 and isinstance(model_type, str)
    if not whole or not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{what}: must have config, hidden_size, model_type, and adapter_names of two or more")
    assert isinstance(section, dict) and type(hidden) is int
    for option, value in _COMPUTED.items():
        if section.get(option, value) != value:
            raise CheckpointError(f"{what}: {option} = {section[option]}: only {value} can be represented here")
    given = read_tensors(folder, "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin", allow_bin)
    check_finite(given, folder)
    tensors = {name.removeprefix(f"{model_type}."): tensor for name, tensor in given.items()}
    sites = _sites(tensors, ",".join(names), hidden, folder)
    dropout = section.get("dropout_prob")
    return ForeignFusion(
        names=tuple(names),
        tensors=tensors,
        sites=sites,
        base={"model_type": model_type, "hidden_size": hidden},
        dropout=float(dropout) if isinstance(dropout, int | float) else None,
    )


def _sites(tensors: dict[str, Tensor], name: str, hidden: int, folder: Path) -> tuple[str, ...]:
    """The sites of whole fusions with the right shapes."""
    parts: dict[str, set[str]] = {}
    wrong = []
    for key, tensor in tensors.items():
        found = _TENSOR.fullmatch(key)
        shape = (hidden,) if key.endswith("bias") else (hidden, hidden)
        if found is None or found["name"] != name:
            wrong.append(f"{key} is no tensor of the fusion {name!r}")
        elif tuple(tensor.shape) != shape:
            wrong.append(f"{key} {tuple(tensor.shape)}, expected {shape}")
        else:
            parts.setdefault(found["site"], set()).add(found["part"])
    wrong += [f"{site} lacks some of query, key and value" for site, own in parts.items() if len(own) < 5]
    if wrong or not parts:
        listed = "; ".join(sorted(wrong)[:4]) or "there are none"
        raise CheckpointError(f"{folder}: the tensors differ from adapter_fusion_config.json: {listed}")
    return tuple(sorted(parts, key=lambda site: (int(site.split(".")[2]), site)))
