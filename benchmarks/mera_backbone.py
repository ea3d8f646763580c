"""The backbones of MerA's tables: the pretrained encoder, and one with a language head for what is read by prompts.

MiniLM has no language head. The other one is pretrained here with SCTD, as in ``benchmarks/sctd_arms.py`` but three
times as long: half an hour on two cores, once. A folder of another model with its language head may take its place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.sctd_arms import SUITES
from benchmarks.sctd_runs import pretrain
from benchmarks.shared import ROOT, backbone
from peft_lightning import BackboneConfig
from peft_lightning.study.records import read_record, write_record

__all__ = ["PRETRAINED", "model_of"]

PRETRAINED = "sctd"

_TIMES = 3
_CALIBRATION = ROOT / "benchmarks" / "results" / "sctd" / "calibration.json"


def model_of(
    name: str, folder: Path, environment: dict[str, Any], say: Console, *, given: str | None, tiny: bool
) -> BackboneConfig:
    """Return a backbone, pretrained first where it has to be and is not in ``folder``.

    Args:
        name: minilm or sctd; the same toy for both if tiny.
        folder: of what is pretrained here.
        environment: of its record.
        say: where to say that it takes time.
        given: folder or hub name of a model that takes its place.
        tiny: a toy.
    """
    dtype = "float32" if tiny else "bfloat16"
    if given is not None:
        return BackboneConfig(name=given, dtype=dtype)
    if tiny or name != PRETRAINED:
        return backbone(tiny, dtype)
    home, record = folder / PRETRAINED, folder / f"{PRETRAINED}.json"
    if not record.is_file():  # it is written last: what was stopped is begun again
        say.print("pretraining the backbone with a language head: once, half an hour")
        recipe = SUITES["cpu"].recipe
        suite = replace(SUITES["cpu"], recipe=replace(recipe, budget=recipe.budget * _TIMES))
        calibration = read_record(_CALIBRATION)
        settings = {"arm": "sctd", "seed": 0, "steps": int(calibration.results["steps/sctd"]) * _TIMES}
        write_record(record, pretrain(suite, "sctd", 0, settings, calibration, environment, home))
    return BackboneConfig(name=str(home), dtype=dtype)
