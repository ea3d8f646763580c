"""Two CPU processes over gloo, started by torchrun, agree with each other to the bit and with one process to 1e-5."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning.callbacks.log import MetricsCSV
from tests.toy import METHODS
from tests.two_ranks_worker import runs

# One worker runs all of these: they share the processes' results.
pytestmark = [pytest.mark.xdist_group("two ranks"), pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def finish(words: list[str], **options: Any) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=ROOT, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    finish([sys.executable, "-m", "tests.two_ranks_worker", str(folders[1])])
    finish([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "tests.two_ranks_worker", str(folders[2])])
    return folders


@pytest.mark.parametrize("name", [name for name, *_ in runs()])
def test_as_one_process(name: str, ends: dict[int, Path]) -> None:
    assert_as_one_process(name, ends[1], ends[2], 2)


def assert_as_one_process(name: str, one_folder: Path, folder: Path, ranks: int) -> None:
    """A run on ``ranks`` processes agrees on all of them, and with that of one process."""
    alone = name.removesuffix("-fsdp2")
    one = torch.load(one_folder / f"{alone}-0.pt", weights_only=True)
    two = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]
    for key, tensor in two[0]["state"].items():
        for other in two[1:]:
            assert torch.equal(tensor, other["state"][key]), f"ranks differ in {key}"
    for end in two:
        assert end["test"] == two[0]["test"]
        assert end["importance"] == two[0]["importance"]  # not only to a tolerance
        assert (end["importance"] is not None) == (name.startswith("PruneLoRA") and "random" not in name)
        assert end["plan"] == one["plan"] and (one["plan"] is not None) == name.startswith("PruneLoRA")
        assert end["held"] == 1 if name == alone else end["held"] < 1 / ranks + 0.05
    for end in (one, *two):  # stopped in the middle of an epoch and gone on
        # the same bits; but after its first step DDP sums in another order, which matters from three numbers on
        rtol, atol = (1e-5, 1e-6) if ranks > 2 and name == alone and end is not one else (0.0, 0.0)
        for key, tensor in end.get("resumed", {}).items():
            assert_close(tensor, end["state"][key], rtol=rtol, atol=atol, msg=key)
    assert ("resumed" in one) == ("resumed" in two[0]) == alone.endswith("-plain")
    masks = {key: tensor for key, tensor in one["state"].items() if tensor.dtype == torch.bool}
    for key, mask in masks.items():
        assert torch.equal(mask, two[0]["state"][key]), key
        assert not two[0]["state"][key.removesuffix("_mask")][~mask].any(), key
    series = [
        [(row["step"], float(row["train/loss"])) for row in MetricsCSV(path).read() if "train/loss" in row]
        for path in (one_folder / alone, folder / name)
    ]
    # 75 rows in global batches of 16, two epochs; the last of an epoch is a step of its own, unless shapes are fixed
    pretrains = name.startswith("SCTD")
    assert len(series[0]) == {False: (10, 6), True: (8, 4)}[pretrains][alone.endswith("weighed")]
    assert [step for step, _ in series[0]] == [step for step, _ in series[1]]
    assert_close([loss for _, loss in series[1]], [loss for _, loss in series[0]], rtol=1e-5, atol=1e-5)
    assert_close(two[0]["state"], one["state"], rtol=1e-5, atol=1e-5)
    if name != alone:  # a checkpoint does not show that the model was sharded
        saved = [torch.load(path / "last.ckpt", weights_only=True) for path in (one_folder / alone, folder / name)]
        assert saved[0].keys() == saved[1].keys()
        for key in ("optimizer_states", "state_dict"):
            assert_close(saved[1][key], saved[0][key], rtol=1e-4, atol=1e-5)
    # 17 test rows in shards of 9 and 8: a repeated or lost row would change these
    assert_close(two[0]["test"], one["test"], rtol=1e-5, atol=1e-5)
    assert (one["test"][0]["test/accuracy"] * 17) == pytest.approx(
        round(one["test"][0]["test/accuracy"] * 17), abs=1e-4
    )


def test_a_merge_reads_each_of_5_rows_once(ends: dict[int, Path]) -> None:
    """In batches of 2 on either of two processes the last row is one for two."""
    one = torch.load(ends[1] / "odd-0.pt", weights_only=True)
    two = [torch.load(ends[2] / f"odd-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert one["tokens"] == two[0]["tokens"] == two[1]["tokens"]
    assert_close(two[0]["state"], two[1]["state"], rtol=0, atol=0)
    assert_close(two[0]["state"], one["state"], rtol=1e-5, atol=1e-5)


def test_only_rank_0_writes(ends: dict[int, Path]) -> None:
    files = {
        ranks: sorted(p.name for p in (ends[ranks] / f"{METHODS[0].__name__}-plain").iterdir()) for ranks in (1, 2)
    }
    assert files[1] == files[2] == ["best.ckpt", "last.ckpt", "metrics.csv", "previous.ckpt"]


def fit_on_two(folder: Path) -> str:
    """One epoch of the toy run through the ddp overlay."""
    configs = [f"configs/{name}.yaml" for name in ("sparse_adapter", "overlays/toy", "overlays/ddp", "overlays/cpu")]
    words = [sys.executable, "-m", "peft_lightning", "fit", "--run_dir", str(folder)]
    words += [word for config in configs for word in ("--config", config)]
    return finish([*words, "--trainer.devices", "2", "--trainer.max_epochs", "1"])


def test_the_ddp_overlay(tmp_path: Path) -> None:
    printed = fit_on_two(tmp_path / "run")
    assert printed.count("kept share") == 1  # one process reports
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 32  # 2,048 rows in global batches of 64


@pytest.mark.slow
def test_predictions_of_two_ranks_are_whole_and_in_order(tmp_path: Path) -> None:
    fit_on_two(tmp_path / "run")
    words = [sys.executable, "-m", "peft_lightning", "predict", "--ckpt_path", str(tmp_path / "run")]
    finish([*words, "--config", "configs/overlays/ddp.yaml", "--trainer.accelerator", "cpu"])
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(256))
