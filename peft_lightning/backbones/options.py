"""Options of a transformers configuration: which there are, and which a model was made with."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["check_options", "plain_options"]

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
