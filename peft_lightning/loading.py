"""From a file back to a working module: a checkpoint, a run's folder, or an exported adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_lightning.methods  # noqa: F401  the methods must exist before their names can be looked up
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.manifest import MANIFEST_KEY, read_file
from peft_lightning.module import MethodModule

__all__ = ["kind_of", "load", "method_class", "refuse_new_code"]


def method_class(class_path: str) -> type[MethodModule]:
    """The method that a file names. Only classes that are already imported are considered: a file runs no code.

    Raises:
        CheckpointError: if no imported method has this path.
    """
    for kind in _subclasses(MethodModule):
        if f"{kind.__module__}.{kind.__qualname__}" == class_path:
            return kind
    raise CheckpointError(f"the file names the method {class_path!r}, which is unknown; import its module first")


def load(path: str | Path, *, backbone: Any = None) -> Any:
    """Rebuild a trained module, in evaluation mode.

    Args:
        path: a ``.ckpt`` file, a run's folder (its best checkpoint, else its last), or an exported adapter's folder.
        backbone: instead of the backbone's recorded folder or name, for a file that was made elsewhere.

    Returns:
        The module; a task's module answers ``predict([...texts...])``.

    Raises:
        CheckpointError: if the file is missing, damaged, or fits neither the method nor the backbone.
    """
    content = read_file(path)
    manifest = content[MANIFEST_KEY]
    values = dict(manifest["hyper_parameters"])
    refuse_new_code(kind_of(values.get("task")), path)
    if backbone is not None:
        values["backbone"] = backbone
    method = method_class(manifest["class"])
    try:
        module = method(**values)
        module.on_load_checkpoint(content)
    except UsageError as error:  # says by itself what is wrong, such as a package that is missing here
        raise CheckpointError(f"{path}: {error}") from None
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its hyper-parameters do not fit the method ({error})") from None
    module.load_state_dict(content["state_dict"], strict=False)
    return module.eval()


def kind_of(task: Any) -> str:
    """The kind that a recorded task names; empty for a name of the task table, whose kinds are this package's."""
    return str(task.get("kind", "")) if isinstance(task, dict) else ""


def refuse_new_code(class_path: str, path: Any) -> None:
    """A file may name a class outside this package; it must not decide what gets imported.

    Args:
        class_path: dotted path of the class; a name without a dot is this package's own.
        path: the file, for the message.

    Raises:
        CheckpointError: if the class's module has not been imported by the user.
    """
    module = str(class_path).rpartition(".")[0]
    if module and module not in sys.modules:
        raise CheckpointError(f"{path}: it names the class {class_path!r}; import {module} first if you trust it")


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
