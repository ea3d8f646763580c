"""``doctor``: what is installed, what this machine can do, where things are kept, and what would not work.

Heavy packages are imported where their turn comes, and none of them more than its checks need.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from peft_lightning.cli.parser import ToolParser
from peft_lightning.errors import PeftLightningError

__all__ = ["run_doctor"]

_NEEDED = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors", "jsonargparse", "pyarrow")
_WANTED = {
    "seqeval": 'tasks of tags cannot be scored; pip install "peft_lightning[tasks]"',
    "rouge_score": 'summaries cannot be scored; pip install "peft_lightning[tasks]"',
    "onnxruntime": 'export --format onnx does not work; pip install "peft_lightning[onnx]"',
}
_LITTLE = 2 << 30
_Line = tuple[str, str, str]  # what it is about, what was found, and what would not work: "" if all does


def run_doctor(words: list[str]) -> None:
    """Carry out ``doctor``.

    Args:
        words: the command and its options.

    Raises:
        UsageError: for wrong options.
        PeftLightningError: in the end, if something that is needed is broken.
        SystemExit: after ``--help``.
    """
    parser = ToolParser(
        prog="peft-lightning doctor",
        description="Print versions, devices, what they can do, and the folders that are written to; say in one line "
        "each what would not work and how to mend it. The exit status is 1 if something that is needed is broken.",
    )
    parser.add_argument("--data_root", help="a data root to look at (by default $PEFT_LIGHTNING_DATA)")
    given = parser.parse_args(words[1:])
    broken = [*_shown(_versions(), True)]
    if not broken:
        broken += _shown(_devices(), False)
    broken += _shown(_folders(given.data_root), True)
    list(_shown(_further(), False))
    if broken:
        raise PeftLightningError(f"doctor: {len(broken)} broken: {'; '.join(broken)}")
    sys.stdout.write("all that is needed works\n")


def _shown(lines: Iterator[_Line], needed: bool) -> list[str]:
    """Write lines as they come; return what is broken, if it is needed."""
    found = []
    for about, what, problem in lines:
        sys.stdout.write(f"{about:<20}{what}\n")
        if problem:
            sys.stdout.write(f"{'':<20}{'broken' if needed else 'note'}: {problem}\n")
            found.append(f"{about}: {problem}")
        sys.stdout.flush()
    return found if needed else []


def _versions() -> Iterator[_Line]:
    from peft_lightning import __version__

    yield "peft_lightning", __version__, ""
    version = platform.python_version()
    yield "python", version, "" if (3, 11) <= sys.version_info[:2] < (3, 13) else "needs Python 3.11 or 3.12"
    for name in _NEEDED:
        try:
            found, problem = metadata.version(name), ""
        except metadata.PackageNotFoundError:
            found, problem = "absent", f"pip install {name}"
        yield name, found, problem


def _devices() -> Iterator[_Line]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "torch", "cannot be imported", f"install it again ({str(error).splitlines()[0][:200]})"
        return
    yield "processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads", ""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(number) for number in range(cards)]
    built = torch.version.cuda
    missing = f"torch is built for CUDA {built} and sees no device; look at nvidia-smi" if built and not cards else ""
    yield "GPUs", ", ".join(names) or "none: use configs/overlays/cpu.yaml", missing
    for about, check in (("bfloat16", _bfloat16), ("torch.compile", _compiles), ("flash attention", _flash)):
        what, problem = check(cards > 0)
        yield about, what, problem


def _bfloat16(gpu: bool) -> tuple[str, str]:
    import torch

    if not gpu:
        return "on the CPU, where it is slow unless the processor has instructions for it", ""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "yes", ""
    return "no", "gpu_bf16.yaml is slow here; give --trainer.precision 32-true"


def _compiles(gpu: bool) -> tuple[str, str]:
    """Whether what torch.compile needs is there; compiling itself takes a minute."""
    if gpu and importlib.util.find_spec("triton") is None:
        return "no", "triton is missing: pip install triton, or give --model.backbone.compile false"
    if not gpu and not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        return "no", "there is no C++ compiler (g++): install one, or give --model.backbone.compile false"
    return "yes", ""


def _flash(gpu: bool) -> tuple[str, str]:
    import torch

    if not gpu:
        return "no GPU; torch's own attention is used", ""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return "no", f"needs compute capability 8.0, this is {major}.{minor}; torch's other attention is used"
    return "yes, torch's own", ""


def _folders(data_root: str | None) -> Iterator[_Line]:
    from peft_lightning.data.cache import cache_folder

    hub = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
    for about, folder, how in (
        ("cache", lambda: cache_folder(None), "$PEFT_LIGHTNING_CACHE or --data.cache_dir"),
        (
            "hub's cache",
            lambda: Path(
                os.environ.get(hub) or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
            ).expanduser(),
            f"${hub}",
        ),
        ("working folder", Path.cwd, "--run_dir"),
    ):
        try:
            yield (about, *_writable(folder(), how))
        except (OSError, RuntimeError) as error:  # it is gone, its links lead in a circle, nobody has such a home
            yield about, "cannot be looked at", f"{str(error)[:200]}; name another folder by {how}"
    given = data_root or os.environ.get("PEFT_LIGHTNING_DATA")
    if given is None:
        yield "data", "none given (--data_root, $PEFT_LIGHTNING_DATA); the toy tasks and the hub need none", ""
    elif not os.path.isdir(given):
        file = "is a file; give the folder that holds those of the tasks"
        yield "data", given, file if os.path.exists(given) else "there is no such folder; give another one"
    else:
        try:
            tasks = [path for path in Path(given).iterdir() if path.is_dir()]
        except OSError as error:
            yield "data", given, f"cannot be looked into ({error.strerror}); change its rights, or give another one"
            return
        yield "data", f"{given}: {len(tasks)} folders", "" if tasks else "it holds no folder of a task"


def _writable(folder: Path, how: str) -> tuple[str, str]:
    """The folder with its free space, or the nearest one above it that there is."""
    with suppress(FileNotFoundError, NotADirectoryError):  # that it is too long a name, say, is no reason to go up
        folder.stat()
    there = next(path for path in (folder, *folder.resolve().parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    what = f"{folder}, {free / 2**30:.1f} GiB free"
    try:  # rights do not say all: what is mounted there may take nothing
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        why = (error.strerror or "it is no folder").lower()
        return what, f"{there} cannot be written to ({why}); change its rights, or name another folder by {how}"
    if free < _LITTLE:
        return what, f"less than {_LITTLE >> 30} GiB free; make room, or name another folder by {how}"
    return what, ""


def _further() -> Iterator[_Line]:
    for name, problem in _WANTED.items():
        there = importlib.util.find_spec(name) is not None
        yield name, "yes" if there else "absent", "" if there else problem
