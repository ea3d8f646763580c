"""The SparseAdapter benchmark end to end on toy data; its tables and figures from records made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import sparse
from benchmarks.shared import ROOT
from benchmarks.sparse_arms import SUITES
from benchmarks.sparse_table import read_task, sparse_table, tasks_table, write_figures
from peft_lightning.errors import DataError, UsageError
from peft_lightning.study.records import RunRecord, read_record, write_record

SUITE, GPU = SUITES["mrpc"], SUITES["gpu"]


def _record(name: str, seed: int, score: float, task: str = "mrpc", metric: str = "accuracy") -> RunRecord:
    return RunRecord(
        name=f"{task}-{name}-seed{seed}",
        status="finished",
        config={},
        data={"task": task, "metric": metric, "train_rows": 3668, "validation_rows": 408},
        model={"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384},
        seeds={"module": seed, "data": seed},
        environment={
            "commit": "a" * 40,
            "dirty": False,
            "versions": {"torch": "2", "transformers": "5"},
            "device": {"kind": "cpu", "name": "a processor", "threads": 2},
        },
        results={
            metric: score,
            "f1": 0.9,
            "majority": 0.684,
            "majority_f1": 0.812,
            "trained_parameters": 1000.0,
            "head_parameters": 100.0,
            "kept_share": 0.6,
        },
        series={
            "at": [10.0, 20.0, 30.0],
            f"val/{metric}": [score - 0.1, score - 0.05, score],
            "step/at": [5.0, 10.0],
            "step/loss": [0.7, 0.5],
        },
    )


def _rows(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_arms_are_those_of_the_paper() -> None:
    assert [arm.name for arm in SUITE.arms] == (
        "dense random40 magnitude40 er40 snip40 grasp40 snip20 snip60 snip80 large2 large4".split()
    )
    names = "dense random40 magnitude40 er40 snip40 grasp40 large2 large3 large4"
    assert [arm.name for arm in GPU.arms] == f"{names} pfeiffer s_pfeiffer lora s_lora mam s_mam".split()
    assert {arm.name: arm.baseline for arm in GPU.arms if arm.baseline != "dense"} == {
        "s_pfeiffer": "pfeiffer",
        "s_lora": "lora",
        "s_mam": "mam",
    }
    for suite in (SUITE, GPU):
        assert {arm.baseline for arm in suite.arms} <= {arm.name for arm in suite.arms if arm.dense}


def test_runs_go_seed_by_seed_over_all_arms() -> None:
    runs = SUITE.runs(tiny=True)
    assert [run.name for run in runs] == [
        f"mrpc-{arm.name}-seed{seed}" for seed in SUITE.seeds[:2] for arm in SUITE.arms
    ]


def test_table() -> None:
    records = {
        "dense": [_record("dense", seed, score) for seed, score in enumerate((0.80, 0.81, 0.82))],
        "snip40": [_record("snip40", seed, score) for seed, score in enumerate((0.81, 0.82, 0.83))],
    }
    text = sparse_table(SUITE, records)
    dense, snip, majority = _rows(text)
    assert (dense["arm"], dense["accuracy over dense"]) == ("Houlsby adapters, dense", "")
    assert (snip["accuracy"], snip["accuracy over dense"]) == ("0.820 ± 0.025", "0.010 ± 0.000")
    assert (snip["F1"], snip["kept share"], snip["trained parameters"]) == (
        "0.900 ± 0.000",
        "60.0%",
        "900 + head 100",
    )
    assert (majority["accuracy"], majority["F1"]) == ("0.684", "0.812")
    assert "Seeds 0, 1, 2" in text
    assert "commit aaaaaaaaaaaa." in text
    assert "Failed setup" not in text


def test_a_weak_dense_arm_is_called_failed() -> None:
    text = sparse_table(SUITE, {"dense": [_record("dense", 0, 0.73)], "snip40": [_record("snip40", 0, 0.5)]})
    assert text.endswith("**Failed setup:** less than 5 points over the majority class: Houlsby adapters, dense.")


def test_table_of_several_tasks_pairs_the_mean_with_its_own_dense_arm() -> None:
    scores = {"pfeiffer": (0.7, 0.8), "s_pfeiffer": (0.71, 0.83)}
    records = {
        task: {
            arm: [_record(arm, seed, score + shift, task, metric) for seed, score in enumerate(values)]
            for arm, values in scores.items()
        }
        for task, metric, shift in (("mrpc", "accuracy", 0.0), ("cola", "mcc", 0.1))
    }
    records["cola"]["dense"] = [_record("dense", 0, 0.5, "cola", "mcc")]
    dense, pfeiffer, sparse_arm, majority = _rows(tasks_table(GPU, records))
    assert (dense["cola Matthews"], dense["mrpc accuracy"], dense["mean"]) == ("0.500", "", "")
    assert (pfeiffer["mean"], pfeiffer["mean over its dense arm"]) == ("0.800 ± 0.635", "")
    assert sparse_arm["mean over its dense arm"] == "0.020 ± 0.127"
    assert majority["mrpc accuracy"] == "0.684"


@pytest.mark.parametrize("suite", list(SUITES))
def test_no_record(suite: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no record to make a table of"):
        sparse.main(["--suite", suite, "--report", "--out", str(tmp_path)])


def test_report_needs_the_records_only(tmp_path: Path) -> None:
    for arm in ("dense", "random40", "snip20", "snip40", "large2"):
        for seed in SUITE.seeds:
            write_record(tmp_path / f"mrpc-{arm}-seed{seed}.json", _record(arm, seed, 0.8 + seed / 100))
    before = (ROOT / "README.md").read_bytes(), (ROOT / "benchmarks" / "RESULTS.md").read_bytes()
    pictures = []
    for _ in range(2):
        sparse.main(["--report", "--out", str(tmp_path)])
        pictures.append([(tmp_path / name).read_bytes() for name in ("sparsity.png", "curves.png")])
        for name in ("sparsity.png", "curves.png"):
            (tmp_path / name).unlink()
    assert pictures[0] == pictures[1]
    assert before == ((ROOT / "README.md").read_bytes(), (ROOT / "benchmarks" / "RESULTS.md").read_bytes())


def test_figures_need_their_arms(tmp_path: Path) -> None:
    dense = {"dense": [_record("dense", 0, 0.8)]}
    assert write_figures(SUITE, tmp_path, {}) == []
    assert write_figures(SUITE, tmp_path, dense) == []
    snip = {"snip20": [_record("snip20", 0, 0.8)]}
    assert [path.name for path in write_figures(SUITE, tmp_path, dense | snip)] == ["sparsity.png"]


def test_tiny_run_goes_on_where_it_stopped(tmp_path: Path, cache_dir: Path) -> None:
    sparse.main(["--tiny", "--out", str(tmp_path)])
    paths = {path.stem: path for path in tmp_path.glob("*.json")}
    assert set(paths) == {f"mrpc-{arm.name}-seed{seed}" for arm in SUITE.arms for seed in (0, 1)}
    assert all((tmp_path / name).is_file() for name in ("sparsity.png", "curves.png"))
    before = {name: path.read_bytes() for name, path in paths.items()}
    first = read_record(paths["mrpc-grasp40-seed1"])
    paths["mrpc-grasp40-seed1"].unlink()
    sparse.main(["--tiny", "--out", str(tmp_path)])
    again = read_record(paths["mrpc-grasp40-seed1"])
    assert again.series == first.series
    assert all(path.read_bytes() == before[name] for name, path in paths.items() if name != "mrpc-grasp40-seed1")

    records = read_task(SUITE, tmp_path, "mrpc")
    kept = {name: found[0].results["kept_share"] for name, found in records.items()}
    for arm in SUITE.arms:
        if arm.prune.multiplier == 1:
            assert kept[arm.name] == pytest.approx(1 - arm.prune.share, abs=1e-3)
    trained = {name: found[0].results["trained_parameters"] for name, found in records.items()}
    assert trained["large2"] == trained["large4"] == trained["dense"]
    # checks after every second of six steps, the last one after the last step
    assert first.series["at"] == [2.0, 4.0, 6.0]
    assert (len(first.series["val/accuracy"]), first.series["step/at"]) == (3, [5.0])


def test_tiny_run_of_the_gpu_suite(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse.main(["--suite", "gpu", "--tiny", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*.json"))) == len(GPU.arms) * 3
    rows = _rows(capsys.readouterr().out.partition("\n| arm")[2].join(["| arm", ""]))
    assert [row["arm"] for row in rows] == [arm.title for arm in GPU.arms] + ["majority class or constant"]
    record = read_record(tmp_path / "stsb-s_mam-seed0.json")
    assert record.data["metric"] == "pearson"
    assert record.config["run"]["optim"]["betas"] == [0.9, 0.98]
    assert math.isclose(record.results["kept_share"], 0.6, abs_tol=1e-3)


def test_the_gpu_suite_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cpu: the suite gpu needs cuda, or --tiny"):
        sparse.main(["--suite", "gpu", "--out", str(tmp_path)])


def test_another_encoder_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="--encoder some/where: give --out too"):
        sparse.main(["--encoder", "some/where"])


def test_changes_that_are_not_committed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shared.environment", lambda: {"dirty": True})
    with pytest.raises(UsageError, match="uncommitted changes: commit them, or give --allow-dirty"):
        sparse.main(["--out", str(tmp_path)])
