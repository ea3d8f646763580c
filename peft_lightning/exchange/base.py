"""The base model that a setting names, before it is built, and what a foreign head takes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.errors import CheckpointError
from peft_lightning.files.foreign import ForeignAdapter

__all__ = ["base_model", "with_pooler"]


def base_model(backbone: BackboneConfig) -> tuple[Any, type] | None:
    """The configuration and the class of the bare model that a setting asks for; None if it cannot be built."""
    from transformers import AutoConfig, AutoModel

    try:
        if backbone.config is not None:
            config: Any = AutoConfig.for_model(**backbone.config)
        else:
            config = AutoConfig.from_pretrained(backbone.name, revision=backbone.revision, trust_remote_code=False)
        return config, AutoModel._model_mapping[type(config)]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # building the backbone says what is wrong with it


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

        options = {"revision": backbone.revision, "trust_remote_code": False}
        model, loading = AutoModel.from_pretrained(backbone.name, output_loading_info=True, **options)
        if any("pooler" in name for name in loading["missing_keys"]):
            model = None
    if model is None:
        raise CheckpointError(
            f"{folder}: its head stands on the base model's pooler, which this backbone lacks; import with a new head "
            "(--new_head)"
        )
    dense = {f"dense.{name}": tensor.detach().float() for name, tensor in model.pooler.dense.state_dict().items()}
    return replace(given, head={**dense, **given.head})
