"""What a foreign adapter says of its base model, compared with the backbone at hand before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lightning.backbones.families import FAMILIES, family_of
from peft_lightning.errors import CheckpointError
from peft_lightning.files.foreign import ForeignAdapter
from peft_lightning.files.hf_peft_config import claimed_sites
from peft_lightning.files.strict import check_fingerprint

__all__ = ["check_base", "check_sites", "note_on_name"]

_FACTS = ("model_type", "hidden_size", "num_hidden_layers")


def check_base(facts: Mapping[str, Any], here: tuple[Any, Any] | None, folder: Path) -> None:
    """Compare architecture, width and depth.

    Args:
        facts: what a file says of its base model.
        here: configuration and class of the bare model; None where nothing is known of it.
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
