"""Which classes a configuration may name on the command line, and the modules that the user names for more."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

from peft_lightning.errors import UsageError
from peft_lightning.trust import named_by_user, trust, trusted

__all__ = ["check_built", "restrict_classes", "without_imports"]

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


def check_built(config: Namespace) -> None:
    """Refuse a configuration that would have something built or called that no trainer consists of.

    The parser takes any function or class for an option that is called, such as that of a hook. Here it must be a part
    of a trainer (a module, data, a callback, a logger and so on), or be of a module that the user named.

    Args:
        config: parsed, and nothing of it built.

    Raises:
        UsageError: names the option and what it names.
    """
    for where, path in _named(config.as_dict()):
        module, _, name = path.rpartition(".")
        if not named_by_user(module) and not _is_part(module, name):
            raise UsageError(
                f"{where} = {path}: is no part of a trainer, so a configuration cannot have it built or called; "
                f"--import {module} trusts its module"
            )


def _named(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Option and path of every class or function in a configuration."""
    if isinstance(value, Mapping):
        if isinstance(path := value.get("class_path"), str):
            yield where, path
        for name, part in value.items():
            yield from _named(part, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _named(part, f"{where}[{number}]")
    elif inspect.isroutine(value) or isinstance(value, type):
        yield where, f"{value.__module__}.{value.__qualname__}"


def _is_part(module: str, name: str) -> bool:
    """Whether a path leads to the class of something that a trainer consists of, or to one of this package."""
    import lightning.pytorch as lightning
    from lightning.fabric import plugins as fabric
    from lightning.pytorch import accelerators, loggers, plugins, profilers, strategies

    parts = (
        lightning.LightningModule, lightning.LightningDataModule, lightning.Callback, loggers.Logger,
        profilers.Profiler, strategies.Strategy, accelerators.Accelerator, plugins.LayerSync,
        fabric.Precision, fabric.CheckpointIO, fabric.ClusterEnvironment,
    )  # fmt: skip
    # what the parser has accepted is imported by now; nothing else is, for importing runs a module's code
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and (issubclass(found, parts) or found.__module__.startswith("peft_lightning."))
