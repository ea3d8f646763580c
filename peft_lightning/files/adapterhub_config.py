"""AdapterHub's ``config`` section and ours: the same adapters in other words.

Facts from adapters 1.3.0 (src/adapters: configuration, loading, methods): reduction_factor gives the bottleneck
max(1, int(hidden_size // factor)); files without ``version`` call the tanh approximation ``gelu`` and the exact one
``gelu_orig``; LoRA of versions before 1.1.0 was trained with alpha = r whatever it says. What our adapters do not
compute is refused with the key and the value that ask for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_lightning.errors import CheckpointError
from peft_lightning.files.values import check_booleans, check_known, is_number, refuse
from peft_lightning.layers.adapters import AdapterConfig

__all__ = ["bottleneck_of", "from_config", "reduction_factor", "to_config"]

_NONLINEARITIES = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "tanh": "tanh",
    "swish": "silu",
    "silu": "silu",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
}
_BACK = {"silu": "swish", "leaky_relu": "leakyrelu", "identity": "linear"}
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version

# What a bottleneck adapter and LoRA must say, or leave out.
_BOTTLENECK = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "phm_layer": False,
}
_LORA = {"composition_mode": "add", "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None}
# Settings of bottleneck adapters that ours lack, as that library writes them by default. They change nothing once an
# adapter is trained, or belong to something that is switched off above.
_UNUSED = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
}
_HARMLESS = {*_UNUSED, "architecture", "attention_type", "dtype", "init_weights", "invertible_adapter"}
_BOOLEANS = {
    *(key for key, value in (_BOTTLENECK | _LORA).items() if isinstance(value, bool)),
    *("mh_adapter", "output_adapter", "original_ln_before", "is_parallel"),
    *("selfattn_lora", "intermediate_lora", "output_lora"),
}
_KNOWN_BOTTLENECK = {
    *("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "is_parallel"),
    *("scaling", "residual_before_ln", "leave_out"),
}
_KNOWN_LORA = {"r", "alpha", "attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out"}
_MATRICES = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
_PLACES = ("attention.output", "output")


def from_config(head: Mapping[str, Any], depth: int, what: str) -> tuple[AdapterConfig, list[str]]:
    """Our setting of an AdapterHub adapter.

    Args:
        head: the whole ``adapter_config.json``.
        depth: number of the base model's layers.
        what: the file, for messages.

    Returns:
        The setting, whose ``name`` is the file's if a submodule can have it, and notes on what was not taken over.

    Raises:
        CheckpointError: names the key and the value that our adapters do not have.
    """
    config = head.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{what}: config = {config!r}: must be a mapping")
    architecture = config.get("architecture")
    if architecture not in (None, "bottleneck", "lora"):
        refuse(what, "architecture", architecture, "bottleneck adapters and lora")
    lora = architecture == "lora"
    required, known = (_LORA, _KNOWN_LORA) if lora else (_BOTTLENECK, _KNOWN_BOTTLENECK)
    check_booleans(config, _BOOLEANS, what)
    for key, value in required.items():
        if config.get(key, value) != value:
            refuse(what, key, config[key], repr(value))
    check_known(config, required.keys() | known | _HARMLESS, what)
    notes = []
    for key in ("dropout", "stochastic_depth"):
        if not is_number(value := config.get(key, 0.0)):
            refuse(what, key, value, "a number")
        if value > 0:
            notes.append(f"{key} = {value} is not taken over")
    values = _from_lora(head, config, notes, what) if lora else _from_bottleneck(head, config, what)
    places = values.pop("places")
    default = (
        [_MATRICES["q"], _MATRICES["v"]] if lora else list(_PLACES if values["kind"] == "houlsby" else _PLACES[1:])
    )
    values["target"] = _target(places, default, _left_out(config, what), depth, what)
    values["name"] = _name(head.get("name"), notes, what)
    return AdapterConfig(**values), notes


def _name(name: Any, notes: list[str], what: str) -> str:
    """The adapter's name, changed where it cannot be a submodule's."""
    if not isinstance(name, str) or not name:
        refuse(what, "name", name, "the adapter's name")
    new = re.sub(r"[./\\]", "_", name)
    while hasattr(nn.ModuleDict(), new):
        new += "_"
    if new != name:
        notes.append(f"the adapter's name {name!r} is {new!r} here: the other cannot be a submodule's")
    return new


def _from_bottleneck(head: Mapping[str, Any], config: Mapping[str, Any], what: str) -> dict[str, Any]:
    before, parallel = bool(config.get("original_ln_before", False)), bool(config.get("is_parallel", False))
    kind = "parallel" if parallel else "pfeiffer" if before else "houlsby"
    residual = config.get("residual_before_ln", True)
    if not parallel and residual is not True and (before or residual is not False):
        refuse(what, "residual_before_ln", residual, "true")
    attention, output = bool(config.get("mh_adapter")), bool(config.get("output_adapter"))
    if attention and kind != "houlsby":
        refuse(what, "mh_adapter", True, f"false with {'is_parallel' if parallel else 'original_ln_before'} = true")
    if not attention and not output:
        refuse(what, "output_adapter", config.get("output_adapter"), "true, or mh_adapter = true")
    scaling = config.get("scaling", 1.0)
    if not is_number(scaling):
        refuse(what, "scaling", scaling, "a number")
    spoken = str(config.get("non_linearity")).lower()
    known = _RENAMED.get(spoken, spoken) if "version" not in head else spoken
    if known not in _NONLINEARITIES:
        refuse(what, "non_linearity", config.get("non_linearity"), ", ".join(_NONLINEARITIES))
    return {
        "kind": kind,
        "bottleneck": bottleneck_of(head.get("hidden_size"), config.get("reduction_factor"), what),
        "nonlinearity": _NONLINEARITIES[known],
        "scaling": float(scaling),
        "places": [place for place, there in zip(_PLACES, (attention, output), strict=True) if there],
    }


def _from_lora(head: Mapping[str, Any], config: Mapping[str, Any], notes: list[str], what: str) -> dict[str, Any]:
    rank, alpha, matrices = config.get("r"), config.get("alpha"), config.get("attn_matrices", ["q", "v"])
    if type(rank) is not int or rank < 1:
        refuse(what, "r", rank, "a whole number of at least 1")
    if alpha is None or not is_number(alpha):
        refuse(what, "alpha", alpha, "a number")
    if not isinstance(matrices, list) or not all(matrix in tuple(_MATRICES) for matrix in matrices):
        refuse(what, "attn_matrices", matrices, f"a list of {', '.join(_MATRICES)}")
    if _before_1_1(str(head.get("version", ""))) and alpha != rank:
        notes.append(f"alpha = {alpha} is read as {rank}, with which {head['version']} trained it in truth")
        alpha = rank
    places = [_MATRICES[key] for key in _MATRICES if key in matrices and config.get("selfattn_lora", True)]
    places += ["intermediate.dense"] if config.get("intermediate_lora") else []
    places += ["output.dense"] if config.get("output_lora") else []
    if not places:
        refuse(what, "selfattn_lora", config.get("selfattn_lora"), "at least one matrix to change")
    return {"kind": "lora", "bottleneck": rank, "scaling": alpha / rank, "places": places}


def _before_1_1(version: str) -> bool:
    found = re.fullmatch(r"adapters\.(\d+)\.(\d+)\b.*", version)
    return found is not None and (int(found[1]), int(found[2])) < (1, 1)


def _left_out(config: Mapping[str, Any], what: str) -> set[int]:
    layers = [] if config.get("leave_out") is None else config["leave_out"]
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        refuse(what, "leave_out", layers, "numbers of layers")
    return set(layers)


def _target(places: list[str], default: list[str], left_out: set[int], depth: int, what: str) -> str | None:
    if places == default and not left_out:
        return None
    layers = [str(layer) for layer in range(depth) if layer not in left_out]
    if not layers:
        refuse(what, "leave_out", sorted(left_out), f"fewer than all {depth} layers")
    which = f"({'|'.join(layers)})" if left_out else r"\d+"
    return rf"^encoder\.layer\.{which}\.({'|'.join(re.escape(place) for place in places)})$"


def to_config(
    adapter: AdapterConfig, places: list[str], left_out: list[int], hidden: int, inner: int
) -> dict[str, Any]:
    """AdapterHub's ``config`` of one of our adapters.

    Args:
        adapter: kind, nonlinearity and scaling.
        places: where it is in each layer, relative to the layer.
        left_out: layers without it.
        hidden: width of the base model.
        inner: the bottleneck or rank that the tensors have.

    Raises:
        CheckpointError: if the format has no words for it.
    """
    if adapter.kind == "lora":
        return _to_lora(adapter, places, left_out, inner)
    if adapter.kind not in ("houlsby", "pfeiffer", "parallel"):
        raise CheckpointError(
            f"adapter.kind = {adapter.kind!r}: AdapterHub's format is written for houlsby, pfeiffer, parallel and lora"
        )
    return {
        **_UNUSED,
        **_BOTTLENECK,
        "init_weights": "mam_adapter" if adapter.kind == "parallel" else "bert",
        "is_parallel": adapter.kind == "parallel",
        "leave_out": left_out,
        "mh_adapter": _PLACES[0] in places,
        "non_linearity": _BACK.get(adapter.nonlinearity, adapter.nonlinearity),
        "original_ln_before": adapter.kind == "pfeiffer",
        "residual_before_ln": True,
        "output_adapter": _PLACES[1] in places,
        "reduction_factor": reduction_factor(hidden, inner),
        "scaling": float(adapter.factor),  # that library takes a float for a constant, and nothing else
    }


def _to_lora(adapter: AdapterConfig, places: list[str], left_out: list[int], inner: int) -> dict[str, Any]:
    matrices = [key for key, place in _MATRICES.items() if place in places]
    if other := sorted(set(places) - set(_MATRICES.values()) - {"intermediate.dense", "output.dense"}):
        raise CheckpointError(f"adapter.target reaches {', '.join(other)}: AdapterHub's format has no LoRA there")
    return {
        **_LORA,
        "architecture": "lora",
        "dropout": 0.0,
        "dtype": None,
        "init_weights": "bert",
        "init_weights_seed": None,
        "alpha": _whole(adapter.factor * inner),
        "attn_matrices": matrices,
        "intermediate_lora": "intermediate.dense" in places,
        "leave_out": left_out,
        "output_lora": "output.dense" in places,
        "r": inner,
        "selfattn_lora": bool(matrices),
    }


def bottleneck_of(hidden: Any, factor: Any, what: str) -> int:
    """The bottleneck that a reduction factor gives.

    Raises:
        CheckpointError: if the factor is not a positive number, or differs between layers.
    """
    if type(hidden) is not int or hidden < 1:
        refuse(what, "hidden_size", hidden, "a whole number of at least 1")
    if isinstance(factor, Mapping) and len(set(map(str, factor.values()))) == 1 and "default" in factor:
        factor = factor["default"]
    if not is_number(factor) or not factor > 1e-6:
        refuse(what, "reduction_factor", factor, "one number above 0, the same in all layers")
    return max(1, int(hidden // factor))


def reduction_factor(hidden: int, inner: int) -> int | float:
    """The factor that gives a bottleneck: whole where it can be, else with as few decimals as it takes."""
    if hidden % inner == 0:
        return hidden // inner
    for decimals in range(1, 16):
        most = math.floor(hidden / inner * 10**decimals)
        for factor in (most / 10**decimals, (most - 1) / 10**decimals):  # a float may lie above what it stands for
            if factor > 0 and int(hidden // factor) == inner:
                return factor
    raise CheckpointError(f"no reduction factor gives a bottleneck of {inner} at width {hidden}")


def _whole(value: float) -> int | float:
    """A product of floats that is whole but for rounding, as the whole number that it is."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
