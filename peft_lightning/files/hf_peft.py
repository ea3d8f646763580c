"""LoRA in the format of Hugging Face PEFT, read and written without that library.

``adapter_config.json`` and ``adapter_model.safetensors``; a tensor is named ``base_model.model.<path>.lora_A.weight``
with the path inside the model that was adapted: the bare one, or one with a head, whose path has a prefix (``bert.``)
and whose head lies beside the adapter (``base_model.model.classifier.dense.weight``). Facts from peft 0.21.2
(utils/save_and_load, tuners/tuners_utils, tuners/lora/config).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_safetensors
from torch import Tensor

from peft_lightning.backbones.options import PRUNED_FILE
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.foreign import ForeignAdapter, read_json, read_masks, read_tensors, write_folder
from peft_lightning.files.hf_peft_config import check_config, rank_and_scaling, target_modules, target_of
from peft_lightning.files.hf_peft_patterns import rank_settings, whole_modules
from peft_lightning.files.values import check_finite
from peft_lightning.functional.patterns import LONGEST_PATH
from peft_lightning.layers.adapters import AdapterConfig

__all__ = ["classifier_names", "read_peft", "write_peft"]

_ROOT = "base_model.model."
_LORA = re.compile(r"(?P<path>[^\s]+)\.(?P<matrix>lora_[AB])\.weight")
# Where models with a head keep the bare one. No bare model has a child of such a name.
_PREFIXES = ("bert", "roberta", "electra", "deberta", "model")
# Heads that compute what ours does, by the prefix of the model inside.
_HEADS = {
    "roberta": {"classifier.dense": "dense", "classifier.out_proj": "out"},
    "bert": {"bert.pooler.dense": "dense", "classifier": "out"},
}
# Linear maps whose input is as wide as the model.
_FROM_HIDDEN = (".query", ".key", ".value", "query_proj", "key_proj", "value_proj", "q_proj", "k_proj", "v_proj")
# The settings that choose modules.
_RULE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_SAVED = {"roberta": ["classifier"], "bert": ["classifier", "pooler"]}


def classifier_names(model_type: str, head: Iterable[str]) -> dict[str, str]:
    """Names of a head's tensors in transformers' sequence classifier, where that one computes the same.

    Args:
        model_type: of the backbone, whose text stands on its first token.
        head: our names of the tensors.

    Returns:
        Our names -> theirs; empty where the architecture's head is another one.

    >>> classifier_names("bert", ["dense.bias", "dense.weight", "out.bias", "out.weight"])["out.bias"]
    'classifier.bias'
    """
    parts = _HEADS.get(model_type, {})
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in parts.items() for kind in ("weight", "bias")}
    return names if names.keys() == set(head) else {}


def read_peft(
    folder: str | Path,
    *,
    allow_bin: bool = False,
    with_head: bool = True,
    check: Callable[[dict[str, Any]], object] | None = None,
) -> ForeignAdapter:
    """Read a LoRA, its head where it is one of ours, and the masks beside it.

    Args:
        folder: has ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.
        allow_bin: read the latter; of a pickle only tensors and plain containers are.
        with_head: False passes over a head.
        check: called with what is known of the base model (``base``) before anything else is read in detail.

    Raises:
        CheckpointError: if it is damaged, or asks for something that is not computed here.
        UsageError: if only a pickle is there and ``allow_bin`` is False, or the LoRA is a pruned model's.
    """
    folder = Path(folder)
    if (folder / PRUNED_FILE).exists():
        raise UsageError(f"{folder}: is LoRA for a pruned model; load_pruned() gives the model, and PEFT adds this")
    what = folder / "adapter_config.json"
    config = read_json(what)
    check_config(config, what)
    given = read_tensors(folder, "adapter_model.safetensors", "adapter_model.bin", allow_bin)
    if strange := sorted(name for name in given if not name.startswith(_ROOT)):
        raise CheckpointError(f"{folder}: {strange[0]}: every tensor's name must start with {_ROOT}")
    named = {name.removeprefix(_ROOT): tensor for name, tensor in given.items()}
    lora = {name: tensor for name, tensor in named.items() if _LORA.fullmatch(name)}
    prefix = _prefix(lora, folder)
    name = AdapterConfig().name
    tensors, paths = {}, {}
    for key, tensor in lora.items():
        found = _LORA.fullmatch(key)
        assert found is not None
        if len(key) > LONGEST_PATH:
            raise CheckpointError(f"{folder}: {key[:LONGEST_PATH]}...: so long a name is no path of a known model's")
        site = found["path"].removeprefix(prefix)
        tensors[f"{site}.loras.{name}.{found['matrix']}"] = tensor
        paths[site] = found["path"]
    base = _facts(config, prefix.rstrip("."), tensors)
    if check is not None:
        check(base)
    check_finite(given, folder)
    rank, scaling = rank_and_scaling(config, paths, tensors, name, what)
    head = (
        _read_head({n: t for n, t in named.items() if n not in lora}, prefix.rstrip("."), folder) if with_head else None
    )
    dropout = config.get("lora_dropout")
    notes = [f"lora_dropout = {dropout} is not taken over"] if dropout else []
    if "class" not in base and prefix in ("", "model."):
        notes.append("the file does not say which architecture it was made for; only the shapes were compared")
    adapter = AdapterConfig(kind="lora", bottleneck=rank, scaling=scaling, target=target_of(paths), name=name)
    base["pooler"] = head is not None and "dense.weight" not in head
    rule = {key: config.get(key) for key in _RULE} | {"prefix": prefix}
    masks, prune = read_masks(folder, tensors)
    return ForeignAdapter(
        adapter=adapter,
        tensors=tensors,
        masks=masks,
        prune=prune,
        head=head,
        base=base,
        rule=rule,
        notes=tuple(notes),
    )


def write_peft(
    folder: str | Path, given: ForeignAdapter, modules: Iterable[str], whole: Mapping[str, Tensor] | None = None
) -> None:
    """Write a LoRA, its head if it has one, and the masks beside it.

    Ranks may differ between modules.

    Args:
        folder: made if needed.
        given: ``base`` has model_type, model_name and model_class. With a head the names are those of a model of
            transformers with a sequence classification head, without one those of the bare model.
        modules: paths of all modules in the bare model.
        whole: tensors of modules that were trained as they are, such as norms, by their names inside the bare model.

    Raises:
        CheckpointError: if the format has no words for it.
    """
    if given.adapter.kind != "lora":
        raise CheckpointError(f"adapter.kind = {given.adapter.kind!r}: PEFT's format is for lora only")
    model_type, name = given.base["model_type"], given.adapter.name
    prefix, head = "", {}
    if given.head is not None:
        names = classifier_names(model_type, given.head)
        if not names:
            raise CheckpointError(
                f"backbone of type {model_type!r}: PEFT's format takes the head of {' and '.join(_HEADS)} with "
                "head = 'dense' only; export without the head"
            )
        prefix = f"{model_type}."
        head = {names[key]: tensor for key, tensor in given.head.items()}
    lora = {f"{prefix}{key.replace(f'.loras.{name}.', '.')}.weight": t for key, t in given.tensors.items()}
    saved = {f"{prefix}{key}": tensor for key, tensor in (whole or {}).items()}
    ending = f".loras.{name}.lora_A"
    ranks = {key.removesuffix(ending): tensor.shape[0] for key, tensor in given.tensors.items() if key.endswith(ending)}
    if not ranks:
        raise CheckpointError("there is no LoRA to write: no attention has a head left")
    known = set(modules)
    trained = whole_modules({key.rpartition(".")[0] for key in saved}, [f"{prefix}{path}" for path in known])
    trained += [] if given.head is None else _SAVED[model_type]
    auto = {"base_model_class": given.base["model_class"], "parent_library": "transformers"}
    config = {
        "auto_mapping": auto if given.head is None else None,
        "base_model_name_or_path": given.base.get("model_name"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": trained or None,
        "peft_type": "LORA",
        "target_modules": target_modules(sorted(ranks), known),
        "task_type": None if given.head is None else "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
        **rank_settings({f"{prefix}{path}": rank for path, rank in ranks.items()}, given.adapter.factor),
    }
    tensors = {f"{_ROOT}{key}": tensor for key, tensor in (lora | saved | head).items()}
    files: dict[str, Any] = {"adapter_config.json": config, "adapter_model.safetensors": save_safetensors(tensors)}
    # The format keeps no name of an adapter, so the masks are named as a reader will name it.
    new = AdapterConfig().name
    masks = {key.replace(f".loras.{name}.", f".loras.{new}."): mask for key, mask in given.masks.items()}
    write_folder(Path(folder), files, masks, given.prune)


# -- reading --------------------------------------------------------------------------------------------------------


def _prefix(lora: Mapping[str, Tensor], folder: Path) -> str:
    firsts = {name.partition(".")[0] for name in lora}
    found = firsts & set(_PREFIXES)
    if not lora or (found and len(firsts) > 1):
        raise CheckpointError(f"{folder}: the LoRA tensors are in {', '.join(sorted(firsts)) or 'no module'}; must be "
                              "in one model")  # fmt: skip
    return f"{found.pop()}." if found else ""


def _facts(config: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the file gives away about its base model."""
    facts: dict[str, Any] = {"prefix": prefix} if prefix else {}
    auto = config.get("auto_mapping")
    if isinstance(auto, dict) and isinstance(auto.get("base_model_class"), str):
        facts["class"] = auto["base_model_class"]
    if config.get("base_model_name_or_path"):
        facts["model_name"] = config["base_model_name_or_path"]
    widths = {
        tensor.shape[1]
        for name, tensor in tensors.items()
        if name.endswith(".lora_A") and tensor.ndim == 2 and name.split(".loras.")[0].endswith(_FROM_HIDDEN)
    }
    if len(widths) == 1:
        facts["hidden_size"] = widths.pop()
    layers = [int(found[1]) for name in tensors if (found := re.match(r"(?:encoder\.layer|layers)\.(\d{1,6})\.", name))]
    if layers and isinstance(config.get("target_modules"), list) and config.get("layers_to_transform") is None:
        facts["num_hidden_layers"] = max(layers) + 1
    return facts


def _read_head(given: Mapping[str, Tensor], prefix: str, folder: Path) -> dict[str, Tensor] | None:
    if not given:
        return None
    parts = _HEADS.get(prefix, {})
    expected = {f"{old}.{kind}": f"{new}.{kind}" for old, new in parts.items() for kind in ("weight", "bias")}
    if prefix == "bert" and given.keys() == {"classifier.weight", "classifier.bias"}:
        return {expected[name]: tensor for name, tensor in given.items()}
    if given.keys() != expected.keys():
        known = "; ".join(", ".join(names) for names in _HEADS.values())
        raise CheckpointError(
            f"{folder}: beside LoRA it holds {', '.join(sorted(given)[:4])}, which is not a whole head of ours "
            f"({known}); import with a new head (--new_head)"
        )
    return {expected[name]: tensor for name, tensor in given.items()}
