"""What a foreign adapter says of its base model, compared with the backbone at hand before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.backbones.families import FAMILIES, family_of
from peft_lightning.errors import CheckpointError
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft_config import claimed_sites
from peft_lightning.files.strict import check_fingerprint

__all__ = ["base_model", "check_base", "check_sites", "note_on_name", "with_pooler"]

_FACTS = ("model_type", "hidden_size", "num_hidden_layers")


def base_model(backbone: BackboneConfig) -> tuple[Any, type] | None:
    """The configuration and the class of the bare model that a setting asks for; None if it cannot be built."""
    from transformers import AutoConfig, AutoModel

    try:
        if backbone.config is not None:
            config: Any = AutoConfig.for_model(**backbone.config)
        else:
            config = AutoConfig.from_pretrained(backbone.name, revision=backbone.revision)
        return config, AutoModel._model_mapping[type(config)]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # building the backbone says what is wrong with it


def check_base(facts: Mapping[str, Any], here: tuple[Any, Any] | None, folder: Path) -> None:
    """Compare architecture, width and depth.

    Args:
        facts: what a file says of its base model.
        here: what :func:`base_model` returned.
        folder: for messages.

    Raises:
        CheckpointError: lists the differences.
    """
    if here is None:
        return
    config, model_class = here
    known: dict[str, Any] = {key: getattr(config, key, None) for key in _FACTS}
    known |= {"prefix": model_class.base_model_prefix, "class": model_class.__name__}
    given = {key: facts[key] for key in known if key in facts}
    stem = re.escape(model_class.__name__.removesuffix("Model"))
    if re.fullmatch(rf"{stem}For[A-Z]\w*", str(given.get("class"))):
        given.pop("class")  # the same model under a head
    check_fingerprint(given, {key: known[key] for key in given}, str(folder))


def check_sites(given: ForeignAdapter, here: tuple[Any, Any] | None, folder: Path) -> None:
    """Compare the modules that a file names, in its own words, with those that it holds.

    Raises:
        CheckpointError: lists the differences.
        UsageError: if adapters do not know the architecture.
    """
    if here is None or not given.rule:
        return
    config = here[0]
    family = family_of(config.model_type)
    linears = {f"{layer}.{name}" for layer in family.layers(config) for name in family.linears}
    held = {name.partition(f".loras.{given.adapter.name}.")[0] for name in given.tensors}
    claimed = claimed_sites(given.rule, linears)
    differences = [
        f"{what} {len(sites)}: {', '.join(sorted(sites)[:4])}{', ...' if len(sites) > 4 else ''}"
        for what, sites in (("missing", claimed - held), ("unexpected", held - claimed))
        if sites
    ]
    if differences:
        raise CheckpointError(
            f"{folder}: what target_modules names in this backbone is not what the file holds; {'; '.join(differences)}"
        )


def note_on_name(given: ForeignAdapter, here: tuple[Any, Any] | None) -> list[str]:
    """A line where the recorded name of the base model speaks of another architecture; a name proves nothing."""
    name = given.base.get("model_name")
    if here is None or "class" in given.base or not isinstance(name, str):
        return []
    last, model_type = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower(), here[0].model_type
    told = [kind for kind in FAMILIES if re.search(rf"(?<![a-z]){re.escape(kind.split('-')[0])}(?![a-z])", last)]
    if not told or model_type in told:
        return []
    return [f"it was made on {name[:100]!r}, which sounds like {told[0]}; the backbone here is a {model_type}"]


def with_pooler(given: ForeignAdapter, backbone: BackboneConfig, folder: Path) -> ForeignAdapter:
    """Complete a head that stands on the base model's pooler, which is our head's first layer.

    Raises:
        CheckpointError: if the backbone has no trained pooler.
    """
    if not given.base.get("pooler") or given.head is None:
        return given
    model: Any = None
    if backbone.name is not None:
        from transformers import AutoModel

        model, loading = AutoModel.from_pretrained(backbone.name, revision=backbone.revision, output_loading_info=True)
        if any("pooler" in name for name in loading["missing_keys"]):
            model = None
    if model is None:
        raise CheckpointError(
            f"{folder}: its head stands on the base model's pooler, which this backbone lacks; import with a new head "
            "(--new_head)"
        )
    dense = {f"dense.{name}": tensor.detach().float() for name, tensor in model.pooler.dense.state_dict().items()}
    return replace(given, head={**dense, **given.head})
