"""The pretraining benchmark end to end on little text; its rule, its arithmetic and its tables from numbers by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import sctd, sctd_runs
from benchmarks.sctd_arms import ARMS, SUITES, planned_steps
from benchmarks.sctd_runs import unigram_entropy
from benchmarks.sctd_table import draw, pretrain_table, read_arms, tuning_table, verdict
from benchmarks.shared import ROOT
from peft_lightning.backbones.build import BackboneConfig, build_masked_lm, fingerprint
from peft_lightning.errors import DataError, UsageError
from peft_lightning.study.records import RunRecord, read_record, write_record

SUITE, GPU = SUITES["cpu"], SUITES["gpu"]
ENVIRONMENT = {
    "commit": "a" * 40,
    "dirty": False,
    "versions": {"torch": "2", "transformers": "5"},
    "device": {"kind": "cpu", "name": "a processor", "threads": 2},
}
MODEL = {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 256}


def _pretrained(arm: str, seed: int, loss: float) -> RunRecord:
    results = {"loss": loss, "accuracy": (9 - loss) / 10, "steps": 3000.0, "planned_seconds": 600.0}
    results |= {"training_seconds": 598.0 + seed, "tokens_per_second": 10_000.0, "teacher_share": 0.1}
    results |= {"tokens": 6_400_000.0, "unigram_entropy": 7.0, "training_blocks": 80_000.0, "validation_blocks": 1024.0}
    results |= {"trained_parameters": 7e6} | ({} if arm == "mlm" else {"dropped_loss": loss + 1})
    return RunRecord(
        name=f"pretrain-{arm}-seed{seed}",
        status="finished",
        config={},
        data={"corpus": "wikipedia_articles"},
        model=MODEL,
        seeds={"module": seed, "data": seed},
        environment=ENVIRONMENT,
        results=results,
        series={"at": [1.0, 2.0], "seconds": [0.5, 1.0], "val/loss": [loss + 1, loss]},
    )


def _tuned(arm: str, seed: int, task: str, score: float) -> RunRecord:
    results = {"accuracy": score, "majority": 0.684}
    return RunRecord(
        name=f"{task}-{arm}-seed{seed}",
        status="finished",
        config={},
        data={"task": task, "metric": "accuracy", "train_rows": 3668, "validation_rows": 408},
        model=MODEL,
        seeds={"module": seed, "data": seed},
        environment=ENVIRONMENT,
        results=results | ({"f1": score + 0.05, "majority_f1": 0.812} if task == "mrpc" else {}),
    )


def _rows(text: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


CLEAR = {"mlm": (6.0, 6.1), "token-drop": (6.2, 6.3), "drop+full": (5.9, 6.0), "sctd": (5.5, 5.6)}


@pytest.mark.parametrize(
    ("changes", "entropy", "winner", "said"),
    [
        ({}, 7.0, "sctd", "that of SCTD: 0.400 nat below token dropping, every Fi-th step full, where"),
        ({}, 7.0, "sctd", "at most 0.100 apart, and at least 1.400 nat below the unigram entropy"),
        ({}, 6.125, "sctd", "at least 0.525 nat"),  # of the worst seed, 5.6
        ({}, 6.075, None, "lies 0.475 nat below the unigram entropy of 6.075 with its worst seed, less than 0.5"),
        ({"drop+full": (5.55, 5.65)}, 7.0, None, "are 0.050 nat apart, and the seeds of one arm up to 0.100"),
        # the spread of a third arm counts as well
        ({"mlm": (6.0, 6.5)}, 7.0, None, "are 0.400 nat apart, and the seeds of one arm up to 0.500"),
        ({"mlm": (5.0, 5.125)}, 7.0, "mlm", "that of MLM, nothing dropped"),
        ({"mlm": (6.0,)}, 7.0, None, "not every arm has all its seeds"),
        ({"mlm": ()}, 7.0, None, "not every arm has all its seeds"),
    ],
)
def test_when_a_winner_may_be_named(
    changes: dict[str, tuple[float, ...]], entropy: float, winner: str | None, said: str
) -> None:
    named, text = verdict({**CLEAR, **changes}, entropy, seeds=2)
    assert named == winner
    assert said in text
    assert text.startswith("No winner is named") == (winner is None)


def test_a_gap_as_large_as_the_spread_names_nobody() -> None:
    losses = {"mlm": (6.0, 6.25), "token-drop": (7.0, 7.25), "drop+full": (7.0, 7.25), "sctd": (5.75, 6.0)}
    assert verdict(losses, 9.0, seeds=2)[0] is None
    assert verdict({**losses, "sctd": (5.5, 5.75)}, 9.0, seeds=2)[0] == "sctd"


def test_one_seed_or_a_missing_arm_names_nobody() -> None:
    assert verdict({arm: found[:1] for arm, found in CLEAR.items()}, 7.0, seeds=1)[0] is None
    assert verdict({arm: found for arm, found in CLEAR.items() if arm != "mlm"}, 7.0, seeds=2)[0] is None


@pytest.mark.parametrize(
    ("windows", "interval", "budget", "points", "steps"),
    [
        ([2.0], 10, 600.0, 15, 3000),
        ([2.0, 2.0, 50.0], 10, 600.0, 15, 3000),  # a window that was disturbed
        ([1.0, 3.0], 10, 600.0, 15, 3000),  # the middle of two
        ([2.0], 10, 601.9, 15, 3000),  # rounded down, to equal distances
        ([2.0], 10, 603.0, 15, 3015),
        ([0.3], 3, 600.0, 7, 5999 // 7 * 7),
    ],
)
def test_planned_steps(windows: list[float], interval: int, budget: float, points: int, steps: int) -> None:
    found = planned_steps(windows, interval, budget, points)
    assert found == steps
    assert found % points == 0


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(UsageError, match=r"budget = 1.0 s: a step takes 0.200 s, so 15 validations need more time"):
        planned_steps([2.0], 10, 1.0, 15)


def test_unigram_entropy() -> None:
    # counts + 1: 4, 2, 1, 1 of 8
    training = [torch.tensor([[0, 0], [0, 1]])]
    assert unigram_entropy(training, [torch.tensor([0])], 4) == pytest.approx(math.log(2))
    validation = [torch.tensor([0, 1]), torch.tensor([[3]])]
    assert unigram_entropy(training, validation, 4) == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3)
    assert unigram_entropy([], validation, 4) == pytest.approx(math.log(4))


def test_arms_and_what_they_drop() -> None:
    assert list(ARMS) == ["mlm", "token-drop", "drop+full", "sctd"]
    for suite in (SUITE, GPU, SUITE.tiny()):
        assert len(suite.seeds) == 2
        assert [suite.drop(arm).preset for arm in ARMS] == list(ARMS)
        for arm in ("drop+full", "sctd"):
            assert suite.drop(arm).of("interval") == suite.recipe.interval
    assert (SUITE.recipe.budget, GPU.recipe.budget) == (600.0, 480.0)
    assert SUITE.tiny().on("cuda").recipe.device == "cuda"
    assert {trial.device for trial in SUITE.on("cuda").tasks.values()} == {"cuda"}


def test_pretrain_table() -> None:
    records = {arm: [_pretrained(arm, seed, loss) for seed, loss in enumerate(CLEAR[arm])] for arm in CLEAR}
    text = pretrain_table(SUITE, records)
    mlm, dropping, _, ours = _rows(text)
    assert (mlm["arm"], mlm["loss over mlm"], mlm["loss of the dropping pass"]) == ("MLM, nothing dropped", "", "")
    assert (mlm["steps"], mlm["training s"], mlm["tokens/s"]) == ("3,000", "598 to 599", "10,000")
    assert (dropping["loss"], dropping["loss over mlm"]) == ("6.250 ± 0.635", "+0.200 (+0.200 to +0.200)")
    assert (ours["loss over mlm"], ours["accuracy over mlm"]) == (
        "-0.500 (-0.500 to -0.500)",
        "+0.050 (+0.050 to +0.050)",
    )
    assert (ours["loss of the dropping pass"], ours["teacher steps"]) == ("6.550 ± 0.635", "10.0%")
    assert verdict(CLEAR, 7.0, 2)[1] in text
    assert "80,000 blocks of 128 tokens to train (read at most 0.62 times), 1,024 to validate" in text
    assert "unigram entropy of the same words is 7.000" in text
    assert "Planned: 600 s" in text
    assert "Seeds 0, 1," in text
    assert "commit aaaaaaaaaaaa." in text


def test_a_difference_needs_the_same_seed() -> None:
    records = {"mlm": [_pretrained("mlm", 0, 6.0)], "sctd": [_pretrained("sctd", 0, 5.0), _pretrained("sctd", 1, 1.0)]}
    _, ours = _rows(pretrain_table(SUITE, records))
    assert ours["loss over mlm"] == "-1.000 (-1.000 to -1.000)"
    _, alone = _rows(pretrain_table(SUITE, {**records, "sctd": records["sctd"][1:]}))
    assert alone["loss over mlm"] == ""


def test_unequal_times_are_told() -> None:
    records = {"mlm": [_pretrained("mlm", 0, 6.0)], "sctd": [_pretrained("sctd", 0, 5.0)]}
    for seconds, told in ((627.0, False), (658.0, True)):  # against 598
        records["sctd"][0].results["training_seconds"] = seconds
        assert ("**Unequal times:** the longest run trained 1.10 times" in pretrain_table(SUITE, records)) == told


def test_tuning_table() -> None:
    scores = {"mlm": (0.76, 0.78), "sctd": (0.77, 0.81), "random": (0.68, 0.69)}
    records = {
        task: {arm: [_tuned(arm, seed, task, score) for seed, score in enumerate(found)] for arm, found in arms.items()}
        for task, arms in (("mrpc", scores), ("sst2", {"mlm": (0.7, 0.7), "random": (0.6, 0.6)}))
    }
    text = tuning_table(SUITE, records)
    mlm, ours, control, majority = _rows(text)
    assert (mlm["mrpc over mlm"], ours["mrpc over mlm"]) == ("", "+0.020 (+0.010 to +0.030)")
    assert (ours["sst2 accuracy"], ours["sst2 over mlm"], mlm["mrpc F1"]) == ("", "", "0.820 ± 0.127")
    assert control["pretrained by"] == "nothing: the seed's initial weights"
    assert control["sst2 over mlm"] == "-0.100 (-0.100 to -0.100)"
    assert (majority["mrpc accuracy"], majority["mrpc F1"], majority["sst2 accuracy"]) == ("0.684", "0.812", "0.684")
    assert "Of sst2, 10,240 random rows an epoch" in text
    assert "Of mrpc" not in text
    # the control may be weak, an arm may not
    assert text.endswith("less than 5 points over the majority class: MLM, nothing dropped on sst2.")


@pytest.mark.parametrize("suite", list(SUITES))
def test_no_record(suite: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no record to make a table of"):
        sctd.main(["--suite", suite, "--report", "--out", str(tmp_path)])


def test_report_needs_the_records_only(tmp_path: Path) -> None:
    for arm in ("mlm", "sctd"):
        write_record(tmp_path / f"pretrain-{arm}-seed0.json", _pretrained(arm, 0, 6.0))
    before = (ROOT / "benchmarks" / "RESULTS.md").read_bytes()
    pictures = []
    for _ in range(2):
        sctd.main(["--report", "--out", str(tmp_path)])
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] == pictures[1]
    draw({"mlm": [_pretrained("mlm", 0, 6.0)]}, tmp_path / "loss.png", 1)
    assert (tmp_path / "loss.png").read_bytes() != pictures[0]
    assert (ROOT / "benchmarks" / "RESULTS.md").read_bytes() == before


def test_the_document_has_the_places() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert all(text.count(f"<!-- generated: {name} -->") == 1 for name in ("sctd", "sctd-gpu"))


def _steps(windows: Sequence[float], interval: int, budget: float, points: int) -> int:
    """The plan of a machine of one speed: on a loaded one a single step may take longer than the tiny budget."""
    return planned_steps([interval * budget / points / (1 + len(windows))], interval, budget, points)


def test_tiny_run_goes_on_where_it_stopped(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sctd_runs, "planned_steps", _steps)
    sctd.main(["--tiny", "--out", str(tmp_path)])
    tasks = ("toy_pairs", "toy_sentiment")
    paths = {path.stem: path for path in tmp_path.glob("*.json")}
    names = {f"pretrain-{arm}-seed{seed}" for arm in ARMS for seed in (0, 1)}
    tuned = {f"{task}-{arm}-seed{seed}" for task in tasks for arm in (*ARMS, "random") for seed in (0, 1)}
    assert set(paths) == {"calibration"} | names | tuned
    assert (tmp_path / "loss.png").is_file()
    _check_what_runs_share(tmp_path)

    before = {name: path.read_bytes() for name, path in paths.items()}
    gone = {"pretrain-sctd-seed1", "toy_pairs-random-seed0"}
    first = read_record(paths["pretrain-sctd-seed1"])
    for name in gone:
        paths[name].unlink()
    sctd.main(["--tiny", "--out", str(tmp_path)])
    assert {name for name, path in paths.items() if path.read_bytes() != before[name]} <= gone
    again = read_record(paths["pretrain-sctd-seed1"])
    assert again.series["val/loss"] == first.series["val/loss"]
    assert again.model["files"] == first.model["files"]

    # without its weights a model cannot be tuned again
    paths["toy_pairs-sctd-seed1"].unlink()
    (tmp_path / "models" / "sctd-seed1" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"sctd-seed1 is gone .*: delete the record pretrain-sctd-seed1.json too"):
        sctd.main(["--tiny", "--out", str(tmp_path)])


def _check_what_runs_share(folder: Path) -> None:
    suite, calibration = SUITE.tiny(), read_record(folder / "calibration.json")
    recipe = suite.recipe
    assert all(len(windows) == recipe.turns * recipe.windows for windows in calibration.series.values())
    found = read_arms(suite, folder, "pretrain")
    for arm, records in found.items():
        steps = _steps(calibration.series[arm], recipe.interval, recipe.budget, recipe.points)
        for record in records:
            # validated at equal distances, at last after the last step
            assert record.series["at"] == [steps / 3, steps / 3 * 2, steps]
            assert record.results["steps"] == steps
            assert record.series["seconds"] == sorted(record.series["seconds"])
            assert record.results["training_seconds"] == pytest.approx(record.series["seconds"][-1])
            assert record.results["loss"] == record.series["val/loss"][-1]
            share = steps // 2 / steps if arm == "sctd" else 0.0
            assert record.results["teacher_share"] == pytest.approx(share)
            assert ("dropped_loss" in record.results) == (arm != "mlm")
    for seed in suite.seeds:
        records = [arm[seed] for arm in found.values()]
        assert len({record.model["initial_weights"] for record in records}) == 1
        assert len({record.data["first_batch"] for record in records}) == 1
        assert len({json.dumps(record.model["files"]) for record in records}) == len(ARMS)
        assert {record.seeds["module"] for record in records} == {seed}
        control = build_masked_lm(BackboneConfig(name=str(folder / "models" / f"random-seed{seed}")))
        assert fingerprint(control)["weights"] == records[0].model["initial_weights"]
    assert len({record.model["initial_weights"] for record in found["mlm"]}) == 2
    assert len({record.data["first_batch"] for record in found["mlm"]}) == 2
    # every arm was tuned from its own weights
    for task in suite.tasks:
        for arm, records in read_arms(suite, folder, task).items():
            for seed, record in enumerate(records):
                files = found[arm][seed].model["files"] if arm in found else record.config["run"]["weights"]
                assert record.model["files"] == files


def test_the_gpu_suite_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cpu: the suite gpu needs cuda, or --tiny"):
        sctd.main(["--suite", "gpu", "--out", str(tmp_path)])


def test_changes_that_are_not_committed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shared.environment", lambda: {"dirty": True})
    with pytest.raises(UsageError, match="uncommitted changes: commit them, or give --allow-dirty"):
        sctd.main(["--out", str(tmp_path)])
