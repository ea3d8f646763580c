"""Breaks files and reads them, in a process of its own whose memory is bounded. One line of JSON for each.

usage: python -m tests.fuzz.worker FOLDER COUNT SEED FORMAT...
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS, BYTES = 20, 1 << 30


class Hang(BaseException):
    """A reader took too long."""


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _alarm(*_: Any) -> None:
    raise Hang


def attempt(format: Any, folder: Path, before: Any) -> dict[str, Any]:
    """Read a broken folder; say what came of it, how long it took and how much memory."""
    from peft_lightning.errors import PeftLightningError
    from tests.fuzz.formats import difference, figure

    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far is counted anew
    held, begun = _status("VmRSS"), time.monotonic()
    signal.alarm(SECONDS)
    try:
        wrong = difference(format.trust, before, figure(format.read(folder)))
        result = {"outcome": "read" if wrong is None else wrong}
    except PeftLightningError as error:
        text = str(error)
        result = {"outcome": "refused" if "\n" not in text.strip() else "more than one line", "text": text[:400]}
    except Hang:
        result = {"outcome": f"more than {SECONDS} s"}
    except BaseException:
        result = {"outcome": "a traceback", "text": traceback.format_exc()[-1800:]}
    finally:
        signal.alarm(0)
    return {**result, "seconds": time.monotonic() - begun, "bytes": max(0, _status("VmHWM") - held)}


def main() -> None:
    """Make each format's example once, break copies of it, and read them."""
    import logging
    import warnings

    import torch

    from tests.fuzz.formats import FORMATS, figure
    from tests.fuzz.mutations import mutate

    home, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _alarm)
    prepared = {}
    for name in sys.argv[4:]:
        whole = home / name.replace(" ", "_") / "whole"
        whole.mkdir(parents=True)
        FORMATS[name].make(whole)
        shutil.copytree(whole, home / "first", symlinks=True)
        prepared[name] = (whole, figure(FORMATS[name].read(home / "first")))
        shutil.rmtree(home / "first")
    limit = _status("VmSize") + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, (whole, before) in prepared.items():
        format = FORMATS[name]
        names = list(format.files) or sorted(path.name for path in whole.iterdir() if path.is_file())
        for number in range(count * format.weight):
            rng = random.Random(f"{name} {seed} {number}")
            broken = home / "broken"
            shutil.copytree(whole, broken)
            how = mutate(broken, [name for name in names if (broken / name).is_file()], rng, keep=format.optional)
            result = attempt(format, broken, before)
            sys.stdout.write(json.dumps({"format": name, "number": number, "how": how, **result}) + "\n")
            sys.stdout.flush()
            shutil.rmtree(broken)


if __name__ == "__main__":
    main()
