"""How long a user waits for the first step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shared import ROOT
from peft_lightning.backbones.build import BackboneConfig
from peft_lightning.errors import PeftLightningError

__all__ = ["startup_seconds"]


def startup_seconds(backbone: BackboneConfig, data: Path, repeats: int = 3) -> list[float]:
    """Return the seconds that a whole ``fit`` of one step takes on MRPC, without validation.

    That is a bound from above on the wait for the first step. A run that is not counted warms the caches.

    Raises PeftLightningError, with the command's last line, where it fails.
    """
    command = [
        *(sys.executable, "-m", "peft_lightning", "fit", "--config", "configs/sparse_adapter.yaml"),
        *("--config", "configs/overlays/cpu.yaml", "--model.backbone.name", str(backbone.name)),
        *("--data.task", "mrpc", "--data.root", str(data), "--trainer.max_steps", "1"),
        *("--trainer.limit_val_batches", "0"),
    ]
    seconds = []
    for _ in range(1 + repeats):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--run_dir", str(Path(folder) / "run")], cwd=ROOT, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - started)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise PeftLightningError(f"peft-lightning fit ended with {done.returncode}: {lines[-1]}")
    return seconds[1:]
