"""Which classes a configuration may name on the command line, and the modules that the user names for more."""

from __future__ import annotations

import os

from jsonargparse import set_parsing_settings

from peft_lightning.trust import trust, trusted

__all__ = ["restrict_classes", "without_imports"]

_VARIABLE = "PEFT_LIGHTNING_IMPORT"
# Functions of trusted packages that run what they are given, and a class that calls any function by its name.
_RUN_CODE = (
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.package",
    "torch.serialization",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "transformers.dynamic_module_utils",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.callbacks.lambda_function",
)


def without_imports(words: list[str]) -> list[str]:
    """The words without ``--import MODULE``, whose modules are imported; so are those of $PEFT_LIGHTNING_IMPORT.

    The variable tells further processes of a run what the first one was told.

    Raises:
        UsageError: a module is missing or cannot be imported.
    """
    given = [name for name in os.environ.get(_VARIABLE, "").split(",") if name]
    rest: list[str] = []
    position = 0
    while position < len(words):
        flag, equals, value = words[position].partition("=")
        position += 1
        if flag != "--import":
            rest.append(words[position - 1])
            continue
        if not equals:
            value, position = "".join(words[position : position + 1]), position + 1
        given += [name for name in value.split(",") if name not in given]
    trust(given)
    if given:
        os.environ[_VARIABLE] = ",".join(given)
    return rest


def restrict_classes() -> None:
    """From now on the parser imports nothing but what is trusted, and makes a class only where one is expected."""
    set_parsing_settings(
        import_path_denylist=["*", *_RUN_CODE],
        import_path_allowlist=trusted(),
        instantiate_subclass_spec_in_any=False,
    )
