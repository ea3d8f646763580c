"""What Prune-LoRA costs: inference, training steps, importance and memory, two sizes, arms in turn in one process.

``python -m benchmarks.prune_speed --memory SHAPE KIND ARM`` prints the peak bytes of one arm, training or at inference,
in a process of its own: what one arm frees would hide what the next one takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, cast

import torch

from benchmarks.memory import process_bytes
from benchmarks.prune_models import SHAPES, TIMED, encoder, timed_module
from benchmarks.speed_arms import batches, optimizer_of, step
from benchmarks.turns import take_turns
from peft_lightning import PruneLoRAModule, StructureConfig
from peft_lightning.layers.unit_costs import layer_flops
from peft_lightning.study.memory import peak_bytes, reset_peak
from peft_lightning.study.records import RunRecord
from peft_lightning.task_module import TaskModule

__all__ = ["main", "measure"]

_EXAMPLES, _AT_ONCE, _TOKENS = 100, 25, 64
_MEMORY = {"train": tuple(TIMED), "infer": ("lora", "prune", "ffn")}


def measure(tiny: bool, threads: int, environment: dict[str, Any]) -> RunRecord:
    """Measure everything once and return the record; series are seconds, bytes and counts by ``shape/what/arm``."""
    turns, repeats = (2, 1) if tiny else (8, 2)
    shapes = ("minilm",) if tiny else tuple(SHAPES)
    started = time.perf_counter()
    series: dict[str, list[float]] = {}
    for shape in shapes:
        series |= {f"{shape}/{name}": values for name, values in _sizes(shape, tiny).items()}
        for rows in (32, 1):
            found = _inference(shape, rows, turns * (1 if rows > 1 else 8), tiny)
            series |= {f"{shape}/infer{rows}/{name}": values for name, values in found.items()}
        for what, timed in (("step", _steps), ("importance", _importance)):
            series |= {f"{shape}/{what}/{name}": values for name, values in timed(shape, turns, tiny).items()}
        words = ["benchmarks.prune_speed", *(["--tiny"] * tiny), "--threads", str(threads), "--memory", shape]
        for kind, names in _MEMORY.items():
            for name in _chosen(names, kind, tiny):
                series[f"{shape}/memory_{kind}/{name}"] = process_bytes([*words, kind, name], repeats)
    return RunRecord(
        name="prune_speed",
        status="finished",
        config={"turns": turns, "rows": 32, "tokens": _TOKENS, "memory_repeats": repeats, "threads": threads},
        data={"steps": "random tokens"},
        model={"shapes": {shape: encoder(shape, tiny).config for shape in shapes}},
        seeds={"tokens": 0},
        environment=environment,
        results={name: median(values) for name, values in series.items()},
        series=series,
        seconds=time.perf_counter() - started,
    )


def _chosen(names: Sequence[str], kind: str, tiny: bool) -> Sequence[str]:
    """Arms whose memory is measured; a process takes seconds to start, so a try-out has one."""
    return names if not tiny else names[:1] if kind == "train" else ()


def _sizes(shape: str, tiny: bool) -> dict[str, list[float]]:
    """Parameters of the model that is deployed and of what trains, and operations on one text."""
    found: dict[str, list[float]] = {}
    for name in TIMED:
        module = timed_module(shape, name, tiny)
        backbone = sum(p.numel() for n, p in module.backbone.named_parameters() if ".loras." not in n)
        head = sum(p.numel() for p in module.head.parameters())
        found[f"parameters/{name}"] = [backbone + head]
        found[f"trained/{name}"] = [sum(p.numel() for p in module.trainable_parameters().values())]
        found[f"flops/{name}"] = [layer_flops(module.backbone, _TOKENS)]
    return found


def _inference(shape: str, rows: int, turns: int, tiny: bool) -> dict[str, list[float]]:
    """Seconds of merged models; the one that nothing was removed from is the dense one."""
    arms: dict[str, Callable[[], object]] = {}
    for name in ("lora", "prune", "ffn"):
        module = cast(PruneLoRAModule, timed_module(shape, name, tiny)).merge().eval()
        (batch,) = batches(module, 1, rows)
        arms[name] = partial(_answer, module, batch)
    return take_turns(arms, turns)


@torch.inference_mode()
def _answer(module: TaskModule, batch: dict[str, Any]) -> None:
    module(batch["inputs"])


def _steps(shape: str, turns: int, tiny: bool) -> dict[str, list[float]]:
    modules = {name: timed_module(shape, name, tiny) for name in TIMED}
    (batch,) = batches(modules["full"], 1)
    return take_turns(
        {name: partial(step, module, optimizer_of(module), batch) for name, module in modules.items()}, turns
    )


def _importance(shape: str, turns: int, tiny: bool) -> dict[str, list[float]]:
    """Importance over 100 examples, beside a forward and backward pass over them: of all weights, and of LoRA's."""
    count = 1 if tiny else _EXAMPLES // _AT_ONCE
    arms: dict[str, Callable[[], object]] = {}
    for name in ("full", "lora"):
        module = timed_module(shape, name, tiny).eval()
        arms[f"passes_{name}"] = partial(_passes, module, batches(module, count, _AT_ONCE))
    for name, prune in (("heads", StructureConfig()), ("neurons", StructureConfig(ffn_to_prune=0.3))):
        whole = PruneLoRAModule(task="toy_pairs", backbone=encoder(shape, tiny), prune=prune)
        whole.configure_model()
        arms[name] = partial(whole.measure, batches(whole, count, _AT_ONCE))
    return take_turns(arms, max(1, turns // 2), warm=1)


def _passes(module: TaskModule, examples: Sequence[dict[str, Any]]) -> None:
    for batch in examples:
        loss, weight = module.batch_loss(batch)
        (loss / weight).backward()
        module.zero_grad()


def _memory(shape: str, kind: str, name: str, tiny: bool) -> int:
    """The most bytes that an arm holds over a few steps or answers, from building it on, in this process."""
    reset_peak()
    before = peak_bytes()
    module = timed_module(shape, name, tiny)
    (batch,) = batches(module, 1)
    optimizer = optimizer_of(module)
    if kind == "infer":
        cast(PruneLoRAModule, module).merge().eval()
    reset_peak()
    for _ in range(3):
        if kind == "train":
            step(module, optimizer, batch)
        else:
            _answer(module, batch)
    return peak_bytes() - before


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the memory of one arm and write its bytes to the standard output."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prune_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--memory", required=True, choices=list(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("kind", choices=["train", "infer"])
    parser.add_argument("arm", choices=list(TIMED))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sys.stdout.write(f"{_memory(options.memory, options.kind, options.arm, options.tiny)}\n")


if __name__ == "__main__":
    main()
