"""What transformers can build: the options of its configurations, and folders that are not for it."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import read_bytes

__all__ = ["PRUNED_FILE", "check_options", "plain_options", "pruned_folder"]

PRUNED_FILE = "pruned.json"
"""Name of the file of a pruned model; a folder that has it is one."""

_PRUNED = {
    "adapter": "LoRA for a pruned model, which peft_lightning.load_pruned gives",
    "onnx": "a pruned model as ONNX, which only onnxruntime runs",
    "model": "a pruned model, which only peft_lightning.load_pruned reads",
}
_OF_A_FILE = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what means nothing to a configuration: it takes any keyword, so that a typing error passes.

    Raises:
        ValueError: names the option and those near it.
    """
    from transformers import AutoConfig, AutoModel

    plain = AutoConfig.for_model(options["model_type"])
    known = {*plain.to_dict(), *getattr(plain, "attribute_map", {})}
    # Some options have no default in the configuration: the model asks whether they are there.
    source = inspect.getsource(sys.modules[AutoModel._model_mapping[type(plain)].__module__])
    known |= set(re.findall(r'getattr\(config, "(\w+)"', source))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise ValueError(f"{name!r} is no option of {options['model_type']}; near it: {', '.join(near) or 'none'}")


def plain_options(config: Any) -> dict[str, Any]:
    """What a model was made with, as ``BackboneConfig.config`` takes it: its type, and options that are no defaults."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(config.model_type).to_dict()
    given = {name: value for name, value in config.to_dict().items() if name in plain and value != plain[name]}
    options = {name: value for name, value in given.items() if name not in _OF_A_FILE}
    return {"model_type": config.model_type, "vocab_size": config.vocab_size, **options}


def pruned_folder(name: str | None) -> str | None:
    """Why a folder is no backbone, where it is a pruned model's: its tensors are smaller than its configuration says.

    Args:
        name: a folder, or a name that stands for something else.

    Returns:
        What the folder holds and what to do; None if it is no pruned model's.
    """
    if name is None or not (path := Path(name) / PRUNED_FILE).is_file():
        return None
    try:
        kind = parse_json(read_bytes(path)).get("kind")
    except (OSError, ValueError, AttributeError):  # damaged, which load_pruned says
        kind = "model"
    return f"{_PRUNED.get(str(kind), _PRUNED['model'])}; begin with the whole backbone"
