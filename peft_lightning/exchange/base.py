"""What a foreign adapter says of its base model, compared with the backbone at hand before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.backbones.families import family_of
from peft_lightning.errors import CheckpointError
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft_config import claimed_sites
from peft_lightning.files.strict import check_fingerprint

__all__ = ["check_base", "with_pooler"]

_FACTS = ("model_type", "hidden_size", "num_hidden_layers")


def check_base(given: ForeignAdapter, backbone: BackboneConfig, folder: Path) -> None:
    """Compare architecture, width and depth, then the modules that the file names with those that it holds.

    Args:
        given: what a reader returned.
        backbone: the setting; only its configuration is read.
        folder: for messages.

    Raises:
        CheckpointError: lists the differences.
        UsageError: if adapters do not know the architecture.
    """
    from transformers import AutoConfig, AutoModel

    try:
        if backbone.config is not None:
            config: Any = AutoConfig.for_model(**backbone.config)
        else:
            config = AutoConfig.from_pretrained(backbone.name, revision=backbone.revision)
        model_class: Any = AutoModel._model_mapping[type(config)]
    except (OSError, ValueError, KeyError, TypeError):
        return  # building the backbone says what is wrong with it
    facts = {key: given.base[key] for key in (*_FACTS, "prefix", "class") if key in given.base}
    here: dict[str, Any] = {key: getattr(config, key, None) for key in _FACTS}
    here |= {"prefix": model_class.base_model_prefix, "class": model_class.__name__}
    if str(facts.get("class")).startswith(model_class.__name__.removesuffix("Model")):
        facts.pop("class")  # the same model under a head
    check_fingerprint(facts, {key: here[key] for key in facts}, str(folder))
    if given.rule:
        _check_sites(given, config, folder)


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


def _check_sites(given: ForeignAdapter, config: Any, folder: Path) -> None:
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
