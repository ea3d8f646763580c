"""What a pretraining step costs over other steps, its memory, the loader's share, and how fast texts are packed.

The arms take turns, one step each, in one process, so that what slows the machine down slows all of them. Blocks are
random tokens: a step costs the same whatever they say. Loading and packing read real text.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.memory import process_bytes
from benchmarks.pretrain_arms import ARMS, Setting, build_arm, settings, token_batch
from benchmarks.pretrain_table import pretrain_table
from benchmarks.script import CONSOLE, run
from benchmarks.shared import ROOT, clean_environment, data_folder, file_digests
from benchmarks.turns import take_turns
from peft_lightning import MLMDataModule
from peft_lightning.callbacks.throughput import peak_flops
from peft_lightning.data.documents import open_corpus
from peft_lightning.study.memory import peak_bytes, reset_peak
from peft_lightning.study.records import RunRecord, write_record
from peft_lightning.study.tables import write_generated

__all__ = ["main"]

_CORPUS = "wikipedia_articles"


def _time_steps(setting: Setting, turns: int) -> dict[str, list[float]]:
    """Seconds of ``turns`` steps of each arm, taken in turn after a few that are not counted (and may compile)."""
    batch = token_batch(setting)
    steps = {name: build_arm(name, setting, batch) for name in ARMS}
    return take_turns(steps, turns, device=setting.device)


def _memory_here(name: str, setting: Setting) -> int:
    """The most bytes that an arm holds over a few steps, from building it on, in this process."""
    batch = token_batch(setting)
    reset_peak()
    before = peak_bytes()
    step = build_arm(name, setting, batch)
    reset_peak()
    for _ in range(3):
        step()
    return peak_bytes() - before


def _memory(key: str, setting: Setting, tiny: bool, threads: int, repeats: int) -> dict[str, list[float]]:
    if setting.device == "cpu":
        words = ["benchmarks.pretrain", *(["--tiny"] if tiny else []), "--threads", str(threads), "--memory"]
        names = ("mlm", "semantic") if tiny else ARMS  # a process takes seconds to start
        return {f"{key}/memory/{name}": process_bytes([*words, name], repeats) for name in names}
    found = {}
    for name in ARMS:
        gc.collect()
        torch.cuda.empty_cache()
        found[f"{key}/memory/{name}"] = [float(_memory_here(name, setting))]
    return found


def _time_texts(tiny: bool, batches: int) -> dict[str, list[float]]:
    """Seconds to make a batch, and megabytes of text a second: packed from files to file, and tokenised only."""
    inputs = [str(ROOT / "README.md" if tiny else data_folder() / _CORPUS)]
    options: dict[str, Any] = {"vocab_size": 300, "held_out": 0.5} if tiny else {}
    with tempfile.TemporaryDirectory() as folder:
        words: Any = MLMDataModule(inputs=inputs, cache_dir=folder, **options).tokenizer
        texts = _texts(inputs, "train")
        started = time.perf_counter()
        for first in range(0, len(texts), 1000):
            words.backend_tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
        tokenised = _megabytes(texts) / (time.perf_counter() - started)
        whole = sum(_megabytes(_texts(inputs, split)) for split in ("train", "validation"))
        source = MLMDataModule(
            inputs=inputs, tokenizer=words, batch_size=4 if tiny else 16, cache_dir=folder, **options
        )
        started = time.perf_counter()
        source.setup("fit")
        packed = whole / (time.perf_counter() - started)
        loader, seconds = iter(source.train_dataloader()), []
        for _ in range(batches):
            started = time.perf_counter()
            next(loader)
            seconds.append(time.perf_counter() - started)
    return {"loader": seconds, "tokenised_mb": [tokenised], "packed_mb": [packed]}


def _texts(inputs: list[str], split: str) -> list[str]:
    corpus = open_corpus(inputs, split)
    return [piece.text for piece in corpus.read()] if corpus is not None else []


def _megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def _measure(tiny: bool, device: str, threads: int, environment: dict[str, Any]) -> RunRecord:
    turns, repeats = (2, 1) if tiny else (20, 3)
    started = time.perf_counter()
    chosen, series = settings(tiny, device), dict[str, list[float]]()
    for key, setting in chosen.items():
        series |= {f"{key}/{name}": seconds for name, seconds in _time_steps(setting, turns).items()}
        gc.collect()
        torch._dynamo.reset()
        series |= _memory(key, setting, tiny, threads, repeats)
        CONSOLE.print(f"{key}: {time.perf_counter() - started:.0f} s")
    if device == "cpu":
        series |= _time_texts(tiny, batches=5 if tiny else 200)
    return RunRecord(
        name="pretrain",
        status="finished",
        config={
            "settings": {
                key: {"config": s.config, "blocks": s.blocks, "length": s.length} for key, s in chosen.items()
            },
            "compiled": any(setting.compiled for setting in chosen.values()),
            "precision": "float32" if device == "cpu" else "bfloat16 autocast",
            "peak_flops": peak_flops(torch.device(device), "bf16-mixed"),
            "turns": turns,
            "memory_repeats": repeats if device == "cpu" else 1,
            "threads": threads,
        },
        data={"steps": "random tokens"}
        | ({_CORPUS: file_digests(data_folder() / _CORPUS, "*.parquet")} if device == "cpu" and not tiny else {}),
        model={key: setting.config for key, setting in chosen.items()},
        seeds={"tokens": 0, "weights": 0},
        environment=environment,
        results={name: median(values) for name, values in series.items()},
        series=series,
        seconds=time.perf_counter() - started,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the record and the table; or print the bytes of one arm."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="try it in seconds: a small model, no table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--allow-dirty", action="store_true", help="run with uncommitted changes; the record says so")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--memory", choices=tuple(ARMS), help="print the bytes that this arm takes, and nothing else")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.memory:
        (setting,) = settings(options.tiny, "cpu").values()
        sys.stdout.write(f"{_memory_here(options.memory, setting)}\n")
        return
    default = ROOT / "runs" / "bench-tiny" if options.tiny else ROOT / "benchmarks" / "results" / "pretrain"
    record = _measure(
        options.tiny, options.device, options.threads, clean_environment(options.allow_dirty or options.tiny)
    )
    write_record((options.out or default) / f"{options.device}.json", record)
    text = pretrain_table(record)
    if not options.tiny:
        section = "pretrain" if options.device == "cpu" else "pretrain-gpu"
        write_generated(ROOT / "benchmarks" / "RESULTS.md", section, text)
    CONSOLE.print(text)


if __name__ == "__main__":
    run(main)
