"""What the configuration of a LoRA means in Hugging Face PEFT, and which part of it ours can say.

Facts from peft 0.21.2 (tuners/tuners_utils, tuners/lora/config, utils/other).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.values import check_booleans, check_known, is_number, refuse
from peft_lightning.functional.patterns import compile_pattern

__all__ = ["check_config", "claimed_sites", "rank_and_scaling", "target_modules", "target_of"]

# What changes the function, and the values with which it does not.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base model's weights
    **{key: (False, None) for key in ("use_dora", "lora_bias", "use_qalora", "use_bdlora")},
    **{
        key: (None, [], {})
        for key in (
            "layer_replication",
            "megatron_config",
            "target_parameters",
            "trainable_token_indices",
            "loftq_config",
        )
    },
    **{key: (None, {}) for key in ("arrow_config", "alora_invocation_tokens", "corda_config", "velora_config")},
    **{key: (None, {}) for key in ("kasa_config", "monteclora_config", "lora_ga_config")},
}
_DEFAULTS = {"bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}
_KNOWN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("runtime_config", "target_modules", "task_type", "use_rslora"),
}


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_choice(value: Any) -> bool:
    return isinstance(value, str) or _is_texts(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_auto_mapping(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("base_model_class") or "", str)


def _are_layers(value: Any) -> bool:
    return all(type(layer) is int and layer >= 0 for layer in (value if isinstance(value, list) else [value]))


# The types of what is read, where it is not null.
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{key: (_is_choice, "text or a list of texts") for key in ("target_modules", "exclude_modules", "layers_pattern")},
    **{key: (_is_mapping, "a mapping of regular expressions to numbers") for key in ("rank_pattern", "alpha_pattern")},
    "auto_mapping": (_is_auto_mapping, "a mapping that names the base model's class"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "text"),
    "layers_to_transform": (_are_layers, "a number of a layer or a list of them"),
    "lora_dropout": (is_number, "a number"),
    "modules_to_save": (_is_texts, "a list of texts"),
}


def check_config(config: Mapping[str, Any], what: Path) -> None:
    """Refuse what asks for another function than plain LoRA.

    Raises:
        CheckpointError: names the key and the value.
    """
    for key, allowed in _ALLOWED.items():
        value = config.get(key, _DEFAULTS.get(key))
        if not any(type(value) is type(other) and value == other for other in allowed):
            refuse(what, key, value, " or ".join(map(repr, allowed[:2])))
    check_known(config, _ALLOWED.keys() | _KNOWN, what)
    check_booleans(config, ("use_rslora", "inference_mode"), what)
    for key, (fits, words) in _TYPES.items():
        if (value := config.get(key)) is not None and not fits(value):
            raise CheckpointError(f"{what}: {key} = {str(value)[:200]}: must be {words}")


def claimed_sites(rule: Mapping[str, Any], linears: Iterable[str]) -> set[str]:
    """The linear maps that a configuration says it adapts, in that library's reading of it.

    Args:
        rule: ``rule`` of what :func:`read_peft` returned.
        linears: paths of the linear maps in the bare model.

    Raises:
        CheckpointError: if a pattern is no regular expression, or could take too long to match.
    """
    try:
        return {path for path in linears if _claims(rule, rule["prefix"] + path)}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"adapter_config.json: the choice of modules cannot be read ({error})") from None


def rank_and_scaling(
    config: Mapping[str, Any], paths: Mapping[str, str], tensors: Mapping[str, Tensor], name: str, what: Path
) -> tuple[int, float]:
    """The one rank and the one scaling of all matrices, after the patterns that may change either."""
    found: set[tuple[int, float]] = set()
    ranks, alphas = (_patterns(config, key, what) for key in ("rank_pattern", "alpha_pattern"))
    for path in paths.values():
        rank: Any = next((value for pattern, value in ranks if pattern.match(path)), config.get("r"))
        alpha: Any = next((value for pattern, value in alphas if pattern.match(path)), config.get("lora_alpha"))
        if type(rank) is not int or not 1 <= rank < 1e9:
            refuse(what, "r", rank, "a whole number of at least 1")
        if not is_number(alpha):
            refuse(what, "lora_alpha", alpha, "a number")
        found.add((rank, alpha))
    for index, pattern in enumerate(("rank_pattern", "alpha_pattern")):
        if len({key[index] for key in found}) > 1:
            refuse(what, pattern, config.get(pattern), "the same value for all modules")
    ((rank, alpha),) = found
    wrong = []
    for site in paths:
        pair = [tensors.get(f"{site}.loras.{name}.lora_{matrix}") for matrix in "AB"]
        shapes = [tuple(tensor.shape) if tensor is not None else "missing" for tensor in pair]
        inner = [t.shape[i] if t is not None and t.ndim == 2 else None for t, i in zip(pair, (0, -1), strict=True)]
        if inner != [rank, rank]:
            wrong.append(f"{site} (A {shapes[0]}, B {shapes[1]})")
    if wrong:
        raise CheckpointError(f"{what}: r = {rank}, but {len(wrong)} modules differ: {', '.join(wrong[:4])}")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _patterns(config: Mapping[str, Any], key: str, what: Path) -> list[tuple[re.Pattern[str], Any]]:
    patterns = config.get(key) or {}
    try:
        return [(compile_pattern(rf"(.*\.)?({text})$", key, whole=True), value) for text, value in patterns.items()]
    except UsageError as error:
        raise CheckpointError(f"{what}: {error}") from None


def target_of(sites: Iterable[str]) -> str:
    """Our expression for these sites: layers with the same places go together."""
    by_layer: dict[str, list[str]] = {}
    for site in sites:
        found = re.fullmatch(r"(.*?\.\d+)\.(.+)", site)
        layer, place = (found[1], found[2]) if found else ("", site)
        by_layer.setdefault(layer, []).append(place)
    by_places: dict[tuple[str, ...], list[str]] = {}
    for layer, places in by_layer.items():
        by_places.setdefault(tuple(sorted(places)), []).append(layer)
    parts = [
        rf"({'|'.join(map(re.escape, layers))})\.({'|'.join(map(re.escape, places))})"
        for places, layers in by_places.items()
    ]
    return f"^({'|'.join(parts)})$"


def target_modules(sites: list[str], modules: set[str]) -> list[str]:
    """The shortest ends of paths that name the sites and no other module, else the whole paths."""
    for length in range(1, 5):
        ends = {".".join(site.split(".")[-length:]) for site in sites}
        if {path for path in modules if _named(ends, path)} == set(sites):
            return sorted(ends)
    return sites


def _claims(rule: Mapping[str, Any], path: str) -> bool:
    excluded, chosen = rule.get("exclude_modules"), rule.get("target_modules")
    if excluded and _named(excluded, path, "exclude_modules"):
        return False
    saved = rule.get("modules_to_save") or ()
    if any(_pattern(rf"(^|.*\.){name}($|\..*)", "modules_to_save").match(path) for name in saved):
        return False
    if not chosen or not _named(chosen, path):
        return False
    layers = rule.get("layers_to_transform")
    if isinstance(chosen, str) or layers is None or layers == []:
        return True
    patterns = rule.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = _pattern(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", "layers_pattern").match(path)
        if found:
            return int(found["layer"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(choice: Any, path: str, key: str = "target_modules") -> bool:
    if isinstance(choice, str):
        return choice == "all-linear" or _pattern(choice, key).fullmatch(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in choice)


@lru_cache(maxsize=256)
def _pattern(text: str, key: str) -> re.Pattern[str]:
    return compile_pattern(text, key, whole=True)
