"""The Prune-LoRA benchmark end to end on toy data; its tables from records made by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks import prune
from benchmarks.prune_arms import ARMS, SUITES, TUNED, one_rank
from benchmarks.prune_importance import importance_table
from benchmarks.prune_models import TIMED, timed_module
from benchmarks.prune_table import accuracy_table, cost_tables, read_suite
from peft_lightning import PruneLoRAModule
from peft_lightning.errors import DataError, UsageError
from peft_lightning.study.records import RunRecord, read_record, write_record

SUITE = SUITES["cpu"]


def _record(task: str, arm: str, seed: int, score: float) -> RunRecord:
    return RunRecord(
        name=f"{task}-tuned-{arm}-seed{seed}",
        status="finished",
        config={},
        data={"task": task, "metric": "accuracy", "train_rows": 100, "validation_rows": 50},
        model={"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384},
        seeds={"module": seed, "data": seed},
        environment={
            "commit": "a" * 40,
            "dirty": False,
            "versions": {"torch": "2", "transformers": "5"},
            "device": {"kind": "cpu", "name": "a processor", "threads": 2},
        },
        results={
            "accuracy": score,
            "majority": 0.6,
            "trained_parameters": 1100.0,
            "head_parameters": 100.0,
            "backbone_parameters": 9000.0,
            "seconds_per_step": 0.25,
            **({"parameters_left": 8_000_000.0} if arm != "full" else {}),
        },
    )


def _rows(text: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_arms_differ_in_what_they_say() -> None:
    runs = SUITE.runs(tiny=False, encoder="nowhere")
    assert len(runs) == 3 * 2 * 5 + 5
    assert [run.name for run in runs[:5]] == [f"mrpc-tuned-{arm.name}-seed0" for arm in ARMS]
    samples = {run.name: run.trial.sample for run in runs}
    assert {name.partition("-")[0] for name, sample in samples.items() if sample} == {"sst2"}
    precise = {run.name.split("-")[2]: run.trial.precision for run in runs}
    assert precise == {name: "bf16-mixed" if name == "full" else "32-true" for name in precise}
    modules: dict[str, Any] = {run.name.split("-")[2]: run.build() for run in runs[:5]}
    for name in ("prune", "random"):
        assert isinstance(modules[name], PruneLoRAModule) and modules[name].lora == modules["prune"].lora
    assert not modules["lora"].lora.varied and modules["lora"].prune.heads == 0
    assert len(SUITES["gpu"].runs(tiny=False)) == 6 * 3 * 2 * 5
    assert (one_rank(6).rank, one_rank(12).rank, one_rank(2).rank) == (7, 5, 8)


def test_timed_models_are_pruned_as_they_say() -> None:
    heads: dict[str, Any] = {name: timed_module("minilm", name, tiny=True) for name in TIMED if name != "full"}
    kept = {name: sum(map(len, module.plan.heads.values())) for name, module in heads.items()}
    assert kept == {"lora": 8, "prune": 6, "ffn": 6}
    assert heads["prune"].plan.ranks == heads["lora"].plan.ranks
    assert sum(map(len, heads["ffn"].plan.neurons.values())) == 128 - round(0.3 * 128)


def test_tiny_speed(tmp_path: Path) -> None:
    prune.main(["--part", "speed", "--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "speed.json")
    text = cost_tables(record)
    pairs = zip(record.series["minilm/step/prune"], record.series["minilm/step/lora"], strict=True)
    assert f"| {median(a / b for a, b in pairs):.3f} | at most 0.93 |" in text
    total = record.results["minilm/parameters/prune"]
    assert total < record.results["minilm/parameters/lora"] == record.results["minilm/parameters/full"]
    assert f"| {total / 1e6:.2f} M |" in text
    assert record.results["minilm/flops/ffn"] < record.results["minilm/flops/prune"]


def test_tiny_importance(tmp_path: Path, cache_dir: Path) -> None:
    prune.main(["--part", "importance", "--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "importance.json")
    names = {"toy_sentiment", "toy_pairs", "toy_sentiment-toy_pairs"}
    assert set(record.results) == {f"{steps}/{name}" for steps in (0, 100) for name in names}
    assert all(-1 <= value <= 1 for value in record.results.values())
    rows = _rows(importance_table(record))
    pair = rows["toy_sentiment and toy_pairs, single seeds"]
    assert pair["head after 100 steps"] == f"{record.results['100/toy_sentiment-toy_pairs']:.2f}"
    assert rows["toy_pairs, between seeds"]["random head"] == f"{record.results['0/toy_pairs']:.2f}"
    assert {path.name for path in tmp_path.glob("*.png")} == {"heads-0.png", "heads-100.png"}


def test_tiny_learn(tmp_path: Path, cache_dir: Path) -> None:
    prune.main(["--part", "learn", "--tiny", "--threads", "1", "--out", str(tmp_path)])
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names == {f"{task}-tuned-{arm.name}-seed0" for task in ("mrpc", "rte") for arm in ARMS}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    prune.main(["--part", "learn", "--tiny", "--threads", "1", "--out", str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == before
    record = read_record(tmp_path / "mrpc-tuned-prune-seed0.json")
    assert (
        record.results["parameters_left"]
        < read_record(tmp_path / "mrpc-tuned-lora-seed0.json").results["parameters_left"]
    )


def test_accuracy(tmp_path: Path) -> None:
    for seed in (0, 1):
        for arm, score in (("full", 0.8), ("lora", 0.62), ("prune", 0.75 + 0.02 * seed), ("random", 0.7)):
            write_record(tmp_path / f"mrpc-tuned-{arm}-seed{seed}.json", _record("mrpc", arm, seed, score))
    write_record(tmp_path / "sst2-tuned-prune-seed0.json", _record("sst2", "prune", 0, 0.9))
    write_record(tmp_path / "sst2-tuned-random-seed0.json", _record("sst2", "random", 0, 0.85))
    text = accuracy_table(read_suite(SUITE, TUNED, tmp_path))
    rows = _rows(text)
    assert rows["Prune-LoRA, heads by importance"]["sst2"] == "0.900"
    assert rows["Prune-LoRA, heads by importance"]["mrpc"].startswith("0.760 ±")
    assert rows["heads by importance less heads at random"]["sst2"] == "+0.050"
    assert rows["heads by importance less heads at random"]["mrpc"].startswith("0.060 ±")
    assert rows["majority class"] == {"arm": "majority class", "mrpc": "0.600", "sst2": "0.600"} | dict.fromkeys(
        ("backbone left", "trained parameters", "s per step"), ""
    )
    assert rows["full fine-tuning"]["backbone left"] == "0.01 M"
    assert "**Failed setup:** less than 5 points over the majority class: LoRA, one rank on mrpc." in text
    with pytest.raises(DataError, match="there is no record"):
        accuracy_table({})


def test_what_cannot_be_run() -> None:
    with pytest.raises(UsageError, match="the suite gpu needs cuda"):
        prune.main(["--suite", "gpu"])
    with pytest.raises(UsageError, match="give --out too"):
        prune.main(["--encoder", "some"])
    with pytest.raises(UsageError, match="--share 3/2: must be K/N"):
        prune.main(["--share", "3/2"])


def test_processes_that_share_do_every_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(prune, "run_missing", lambda runs, *rest: done.extend(run.name for run in runs))
    for share in ("1/2", "2/2"):
        prune.main(["--part", "learn", "--tiny", "--threads", "1", "--out", str(tmp_path), "--share", share])
    assert sorted(done) == sorted(run.name for run in SUITE.runs(tiny=True))
