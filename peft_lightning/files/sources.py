"""Adapters of any format as plain values: AdapterHub's folders, PEFT's LoRA, and what our own methods saved.

For those who put several adapters together and need neither their modules nor their heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_lightning.errors import CheckpointError
from peft_lightning.files.adapterhub import read_adapterhub
from peft_lightning.files.base_model import check_base, check_sites
from peft_lightning.files.foreign import ForeignAdapter, read_json
from peft_lightning.files.hf_peft import read_peft
from peft_lightning.files.manifest import MANIFEST_KEY, read_file
from peft_lightning.files.strict import check_fingerprint
from peft_lightning.files.values import check_finite
from peft_lightning.layers.adapters import AdapterConfig

__all__ = ["check_source", "foreign_reader", "knows_weights", "read_source", "source_names"]

_METHODS = ("SparseAdapterModule", "MerAModule")
_TENSORS = ("adapter.safetensors", "pytorch_adapter.bin", "adapter_model.safetensors", "adapter_model.bin")
_RECIPE = "merge.json"
_CHECKPOINTS = ("best.ckpt", "last.ckpt")
_HEAD = {f"{part}.{kind}" for part in ("dense", "out") for kind in ("weight", "bias")}
_FACTS = ("model_type", "hidden_size", "num_hidden_layers")


def foreign_reader(folder: Path) -> Callable[..., ForeignAdapter]:
    """The reader of the format that another library's folder is in.

    Raises:
        CheckpointError: if it is no such folder, or an AdapterFusion.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if (folder / "adapter_fusion_config.json").exists():
        raise CheckpointError(f"{folder}: is an AdapterFusion, which cannot be represented here; import its adapters")
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: holds no adapter_config.json, as AdapterHub's library and PEFT write it")
    config = read_json(folder / "adapter_config.json")
    if "peft_type" in config:
        return read_peft
    if "config" in config:
        return read_adapterhub
    raise CheckpointError(f"{folder}: adapter_config.json is neither PEFT's (peft_type) nor AdapterHub's (config)")


def read_source(
    path: str | Path,
    *,
    allow_bin: bool = False,
    with_head: bool = False,
    backbone: nn.Module | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> ForeignAdapter:
    """Read an adapter.

    Args:
        path: a folder of AdapterHub's library or PEFT, or of ours: an exported adapter, a run, or a ``.ckpt``.
        allow_bin: read pickled tensors (``.bin``); nothing but tensors and plain containers is.
        with_head: read a head too, and refuse one that is not understood. False leaves ``head`` None.
        backbone: the bare model that it has to belong to; None: nothing is compared.
        fingerprint: of that model (``backbones.build.fingerprint``), which our own files are compared with.

    Returns:
        The adapter. Its ``origin`` has ``format``, ``files`` (name -> SHA-256), ``has_head``, and where they are known
        ``seed`` (of its initial values), ``task`` (its name), ``method``, and ``backbone`` (a fingerprint). Its
        bottleneck is the one that the tensors have.

    Raises:
        CheckpointError: if it is missing, damaged, of another backbone, or asks for something that is not computed
            here.
        UsageError: if only pickled tensors are there and ``allow_bin`` is False.
    """
    path = Path(path)
    if path.is_dir() and any((path / name).exists() for name in ("adapter_config.json", "adapter_fusion_config.json")):
        given = _foreign(path, allow_bin, with_head, backbone)
    else:
        given = _own(path, with_head)
    if backbone is not None:
        check_source(given, backbone, fingerprint, path)
    return given


def check_source(
    given: ForeignAdapter, backbone: nn.Module, fingerprint: Mapping[str, Any] | None, path: str | Path
) -> None:
    """Compare what is recorded of an adapter's base model with the one at hand, and its tensors' places with its parts.

    Args:
        given: what :func:`read_source` returned.
        backbone: a bare model of transformers.
        fingerprint: of it; None: only facts are compared.
        path: for messages.

    Raises:
        CheckpointError: lists the differences.
    """
    here = (backbone.config, type(backbone))
    check_base(given.base, here, Path(path))
    check_sites(given, here, Path(path))
    if fingerprint is not None and given.origin.get("backbone"):
        check_fingerprint(given.origin["backbone"], fingerprint, str(path))
    there = {name for name, _ in backbone.named_modules()}
    group = ".loras." if given.adapter.kind == "lora" else ".adapters."
    if odd := sorted({name.partition(group)[0] for name in given.tensors} - there):
        raise CheckpointError(f"{path}: has an adapter at {odd[0]}, which this backbone lacks")


def knows_weights(origin: Mapping[str, Any]) -> bool:
    """Whether an adapter's ``origin`` identifies the backbone's weights, as our own files do and others do not."""
    return bool((origin.get("backbone") or {}).get("weights"))


def source_names(paths: Sequence[str | Path]) -> list[str]:
    """Short names of adapters, no two alike: the last part of each path that tells something, numbered where it must.

    >>> source_names(["hub/sst-2", "runs/a/best.ckpt", "other/sst-2"])
    ['sst-2', 'a', 'sst-2 (2)']
    """
    names: list[str] = []
    for path in map(Path, paths):
        full = path.absolute()
        name = full.parent.name if full.name in _CHECKPOINTS else full.stem if full.suffix == ".ckpt" else full.name
        number, unique = 1, name
        while unique in names:
            number += 1
            unique = f"{name} ({number})"
        names.append(unique)
    return names


def _foreign(folder: Path, allow_bin: bool, with_head: bool, backbone: nn.Module | None) -> ForeignAdapter:
    reader = foreign_reader(folder)
    here = None if backbone is None else (backbone.config, type(backbone))
    given = reader(
        folder, allow_bin=allow_bin, with_head=with_head, check=lambda facts: check_base(facts, here, folder)
    )
    config = read_json(folder / "adapter_config.json")
    if config.get("use_rslora") is True:
        raise CheckpointError(
            f"{folder}: use_rslora = True: its scaling goes with its rank, which a merge changes; import it, and "
            "export it again as plain LoRA"
        )
    own = config.get("config")
    seed = own.get("init_weights_seed") if isinstance(own, dict) else None
    held = [folder / name for name in _TENSORS if (folder / name).exists()][:1]
    # what `merge` has left beside an adapter says which backbone it was made for
    recipe = read_json(folder / _RECIPE) if (folder / _RECIPE).exists() else {}
    made_for = recipe.get("backbone")
    origin = {
        **({"backbone": {k: v for k, v in made_for.items() if k != "name"}} if isinstance(made_for, dict) else {}),
        "format": "peft" if reader is read_peft else "adapterhub",
        "files": _digests(held),
        "has_head": (folder / "head_config.json").exists() or bool(config.get("modules_to_save")),
        "seed": seed if type(seed) is int else None,
    }
    return replace(given, origin=origin)


def _own(path: Path, with_head: bool) -> ForeignAdapter:
    """What SparseAdapterModule or MerAModule saved."""
    content = read_file(path)
    manifest = content[MANIFEST_KEY]
    method = str(manifest["class"]).rpartition(".")[2]
    if method not in _METHODS:
        raise CheckpointError(
            f"{path}: was saved by {method}, which has no adapter to take; {' and '.join(_METHODS)} do"
        )
    values, state = manifest["hyper_parameters"], content["state_dict"]
    if method == "MerAModule" and not manifest.get("merged"):
        raise CheckpointError(f"{path}: was saved before its sources were merged, so there is no adapter in it")
    adapter = _setting(manifest.get("adapter", values.get("adapter")), path)
    inside = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    tensors = {name: _plain(t, name, path) for name, t in inside.items() if not name.endswith("_mask")}
    masks = {name.removesuffix("_mask"): tensor for name, tensor in inside.items() if name.endswith("_mask")}
    check_finite(tensors, path)
    backbone = manifest.get("backbone") or {}
    task = values.get("task")
    head = {name.removeprefix("head."): t for name, t in state.items() if name.startswith("head.")}
    if with_head and head and not head.keys() <= _HEAD:
        raise CheckpointError(f"{path}: its head is no classifier of texts, and stays behind")
    labels = task.get("labels") if isinstance(task, dict) else None
    return ForeignAdapter(
        adapter=replace(adapter, bottleneck=_inner(tensors, path)),
        tensors=tensors,
        masks=masks,
        head={name: tensor.float() for name, tensor in head.items()} if with_head and head else None,
        labels=tuple(labels) if labels else None,
        base={key: backbone[key] for key in _FACTS if key in backbone},
        origin={
            "format": "peft_lightning",
            "files": _digests([_tensors_of(path)]),
            "has_head": bool(head),
            "seed": values.get("seed"),
            "task": task.get("name") if isinstance(task, dict) else task,
            "method": method,
            "backbone": dict(backbone),
        },
    )


def _setting(values: Any, path: Path) -> AdapterConfig:
    try:
        return AdapterConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged (its setting of the adapter: {error})") from None


def _plain(tensor: Any, name: str, path: Path) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise CheckpointError(f"{path}: damaged ({name} is no tensor of floats)")
    return tensor.detach().float().contiguous()


def _inner(tensors: Mapping[str, Tensor], path: Path) -> int:
    """The inner width that all layers have."""
    sizes = {t.shape[0] for name, t in tensors.items() if name.endswith(("adapter_down.0.weight", "lora_A"))}
    if len(sizes) != 1:
        raise CheckpointError(f"{path}: damaged (its layers have inner widths {sorted(sizes)}; must be one)")
    return int(sizes.pop())


def _tensors_of(path: Path) -> Path:
    """The file of an adapter folder, a run or a checkpoint that ``read_file`` has read."""
    if not path.is_dir():
        return path
    if (path / "manifest.json").exists():
        return path / "adapter.safetensors"
    return next(path / name for name in _CHECKPOINTS if (path / name).exists())


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
