"""Going on with a run: from its last undamaged checkpoint, under the settings that it was started with.

What says where things are and how fast they go, but decides no number, may differ freely (:data:`FREE`). With other
devices the batches of one step must stay the same, which the loader sees to; sums are then added up in another order.
Anything else that differs is named and refused, or, with ``--resume changed``, named and taken. What the checkpoint
itself decides, such as the optimiser, is refused even then.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lightning.cli.yaml_files import read_yaml
from peft_lightning.errors import UsageError
from peft_lightning.files.latest import latest_checkpoint

__all__ = ["FREE", "RESUME", "checkpoint_to_resume"]

RESUME = ("auto", "changed")
FREE = (
    "run_dir",
    "save_every_n_steps",
    "data.init_args.cache_dir",
    "data.init_args.inputs",
    "data.init_args.root",
    "data.init_args.workers",
    "model.init_args.backbone.name",
    "model.init_args.importance.file",
    "model.init_args.optim.keep_bad_batches",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.num_nodes",
    "trainer.profiler",
)
_FREE_BY_NAME = ("trainer.strategy",)  # what is set inside of it, such as a hook, may decide numbers


def checkpoint_to_resume(folder: Path, effective: Mapping[str, Any], resume: str, *, speaks: bool) -> Path | None:
    """The checkpoint that a run goes on from, or None where it has none yet.

    Args:
        folder: the run's.
        effective: the configuration now; that from before is the folder's ``config.yaml``.
        resume: ``auto``, or ``changed`` for another configuration.
        speaks: whether this process says what there is to say: that the last checkpoint is damaged, or what differs.

    Raises:
        UsageError: names the settings that differ, unless that is what was asked for.
        CheckpointError: if all checkpoints are damaged.
    """
    last, said = latest_checkpoint(folder)
    if last is None:
        if speaks:
            sys.stderr.write(f"peft-lightning: {folder} has no checkpoint yet: the run begins\n")
        return None
    if changed := _changed(folder / "config.yaml", effective):
        listed = "; ".join(changed)
        if resume != "changed":
            raise UsageError(
                f"--resume {resume}: the run in {folder} was started with other settings ({listed}); use the same "
                "ones, another --run_dir, or --resume changed to go on with these"
            )
        said = f"{said + '; ' if said else ''}the run in {folder} goes on with other settings ({listed})"
    if said and speaks:
        sys.stderr.write(f"peft-lightning: {said}\n")
    return last


def _changed(saved: Path, effective: Mapping[str, Any]) -> list[str]:
    if not saved.exists():
        return [f"{saved.name} is missing, so what they were is not known"]
    before, now = (_flat(config) for config in (read_yaml(saved), effective))
    return [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _free(key)
    ]


def _free(key: str) -> bool:
    return key in _FREE_BY_NAME or any(f"{key}.".startswith(f"{free}.") for free in FREE)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
