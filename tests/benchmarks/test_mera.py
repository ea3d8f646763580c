"""MerA's tables from cells that are made up, and a tiny one end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from benchmarks import mera
from benchmarks.mera_arms import MIXED, PLANS, Plan
from benchmarks.mera_cells import Cell, Results, pack, read_results, unpack
from benchmarks.mera_choice import choose_rates, table_cells
from benchmarks.mera_grids import grid, single_name
from benchmarks.mera_plots import FIGURES, draw_figure
from benchmarks.mera_sources import SOURCES, TARGETS, sources_of, train_missing
from benchmarks.mera_table import estimate, gains_table, majority, scores_table, sources_table
from benchmarks.shared import ROOT, backbone
from peft_lightning.errors import DataError, UsageError
from peft_lightning.files.sources import read_source
from peft_lightning.study.grid import read_grid
from peft_lightning.study.statistics import mean_interval

PLAN = replace(PLANS["1"], settings=(("mrpc", 10), ("mnli", 10)), seeds=(1, 2, 3))
TRUTHS = {"mrpc": [1] * 60 + [0] * 40, "mnli": [0] * 34 + [1] * 33 + [2] * 33}


def _cell(arm: str, task: str, seed: int, right: int, **fields: Any) -> Cell:
    """A cell with the first ``right`` rows right, from its seed on."""
    truth = TRUTHS[task]
    places = {(row + 7 * seed) % len(truth) for row in range(right)}
    predictions = [value if row in places else (value + 1) % (max(truth) + 1) for row, value in enumerate(truth)]
    return Cell(arm=arm, task=task, shots=10, seed=seed, predictions=predictions, trained=1234, **fields)


def _results(cells: Sequence[Cell], **facts: Any) -> Results:
    environment = {
        "device": {"name": "a processor", "threads": 2},
        "versions": {"torch": "2", "transformers": "5"},
        "commit": "a" * 40,
        "dirty": False,
    }
    return Results(table="1", environment=environment, facts={"sources": {}, **facts}, truths=TRUTHS, cells=cells)


def _three(arm: str, mrpc: int, mnli: int) -> list[Cell]:
    return [
        _cell(arm, task, seed, right + seed - 2)
        for seed in (1, 2, 3)
        for task, right in (("mrpc", mrpc), ("mnli", mnli))
    ]


def _rows(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]


def _arms(*names: str) -> list[Any]:
    return [arm for name in names for arm in PLAN.arms if arm.name == name]


# -- sources and plans --------------------------------------------------------------------------------------------


def test_a_track_without_its_target_has_as_many_sources_as_any_other() -> None:
    for target in TARGETS:
        for track in ("QA", "NLI", "Sentiment", "Comsense", "STS"):
            names = sources_of(track, target)
            assert len(names) == 2
            assert not set(names) & set(TARGETS)
            assert {SOURCES[name].track for name in names} == {track}


def test_leakage_is_on_purpose_only() -> None:
    assert sources_of("NLI", "mnli", exclude_target=False) == ("mnli", "scitail")
    with pytest.raises(UsageError, match="exclude_target = False: the track QA has no source that is 'mnli'"):
        sources_of("QA", "mnli", exclude_target=False)
    with pytest.raises(UsageError, match="count = 3: the track STS has 2 sources for 'mrpc'"):
        sources_of("STS", "mrpc", 3)
    for name in ("1", "2", "zero"):
        assert not set(PLANS[name].sources()) & set(TARGETS)


def _write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(folder / f"{split}.parquet"))


def _pairs(texts: Sequence[str], **label: Any) -> list[dict[str, Any]]:
    return [{"sentence1": text, "sentence2": f"the {text} is here today", **label} for text in texts]


def test_a_source_is_trained_once_and_without_texts_of_the_targets(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    monkeypatch.setenv("PEFT_LIGHTNING_DATA", str(root))
    shown = "The red dog, they say, is very large indeed."
    for split in ("train", "validation"):
        _write(root / "mrpc", split, _pairs([shown if split == "validation" else "a b c"], label=1))
        _write(root / "sst2", split, [{"sentence": "good", "label": 1}])
        _write(root / "stsb", split, _pairs(["good", "a cat", "an owl", "a dog"], label=2.5))
    _write(root / "stsb", "train", _pairs(["good", "a cat", "the red dog they say is very large indeed"], label=2.5))
    for split in ("train", "validation_matched"):
        _write(root / "mnli", split, [{"premise": "one", "hypothesis": "two", "label": 0}])
    given: Any = (["stsb"], tmp_path / "sources", backbone(True), {}, Console(quiet=True))
    folder, record = train_missing(*given)["stsb"]
    assert (record.data["train_rows"], record.data["removed_rows"]) == (2, 1)
    assert read_source(folder).adapter.bottleneck == 48
    weights = load_file(folder / "adapter.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not [*folder.glob("*head*")]

    written = (folder.parent / "record.json").stat().st_mtime_ns
    assert train_missing(*given)["stsb"][0] == folder
    assert (folder.parent / "record.json").stat().st_mtime_ns == written
    (folder.parent / "record.json").unlink()  # as if it had been stopped
    again, _ = train_missing(*given)["stsb"]
    assert again == folder
    _write(root / "stsb", "train", _pairs(["good", "a cat", "a bird"], label=2.5))
    assert train_missing(*given)["stsb"][0] != folder


def test_sources_start_from_values_of_their_own() -> None:
    assert len({source.seed for source in SOURCES.values()}) == len(SOURCES)


def test_plans_are_what_was_asked_for() -> None:
    first = PLANS["1"]
    methods = "zero full fusion adapter single sum avg wts acts acts+ select wide".split()
    assert [arm.name for arm in first.arms if arm.main] == methods
    assert first.settings == (("mrpc", 10), ("mrpc", 30), ("sst2", 10), ("sst2", 30), ("mnli", 10))
    assert first.sources() == tuple(name for name in SOURCES if name in MIXED)
    for plan in PLANS.values():
        assert len(set(plan.seeds)) == 10
        assert not set(plan.seeds) & set(plan.held)
        assert len({arm.name for arm in plan.arms}) == len(plan.arms)
        assert {plan.baseline_of(arm).mode for arm in plan.arms} == set(plan.modes)
    assert {arm.mode for arm in PLANS["2"].arms} == {"head", "prompt", "prompt-demo"}
    assert first.fewest == (("mrpc", 10), ("sst2", 10), ("mnli", 10))
    scales = {(arm.preset, arm.scale) for arm in first.run if arm.method == "mera"}
    assert {(preset, scale) for preset in ("avg", "wts", "acts", "acts+") for scale in (None, 2.0, "sum")} <= scales


def test_reported_splits_choose_nothing() -> None:
    with pytest.raises(UsageError, match=r"held = \(1, 2\): seeds \[2\] are reported; choose on others"):
        replace(PLAN, seeds=(2, 3), held=(1, 2))


@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("report", [False, True])
def test_grids_are_studies(name: str, report: bool, tmp_path: Path) -> None:
    plan = PLANS[name].tiny()
    folders = {source: tmp_path / source for source in plan.sources()}
    for arms in plan.modes.values():
        values = grid(
            plan,
            arms,
            folders,
            backbone(True),
            seeds=plan.seeds,
            rates={arm.name: (1e-3,) for arm in arms},
            singles={task: plan.sources()[:2] for task in plan.tasks},
            report=report,
            tiny=True,
        )
        found = read_grid(values)
        assert list(found.method_grids) == [arm.name for arm in arms]
        assert {regime.test_rows for regime in found.regimes.values()} == {plan.test_rows if report else 1}
        for arm in arms:
            entry = found.method_grids[arm.name]
            for task in plan.tasks:
                given = entry.arguments(task)
                if arm.preset == "single":
                    assert list(given) == [single_name(source) for source in plan.sources()[:2]]
                elif arm.sources(task):
                    assert given["default"]["sources"] == [str(folders[source]) for source in arm.sources(task)]
                if arm.wide:
                    assert given["default"]["merge"] == {"preset": "select", "recipe": {"width": 4 * 6}}


# -- cells ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "values"), [(1, [0, 1, 1]), (2, [2, 0, 1, 2, 2]), (3, [7, 0, 5]), (2, [])])
def test_packing(bits: int, values: list[int]) -> None:
    assert unpack(pack(values, bits), bits, len(values)) == values


def test_what_bits_cannot_hold() -> None:
    with pytest.raises(DataError, match="classes from 0 to 2: 1 bits hold 0 to 1"):
        pack([0, 2], 1)


def test_results_come_back(tmp_path: Path) -> None:
    results = _results(_three("adapter", 70, 50) + _three("acts", 75, 55), minutes=3)
    results.write(tmp_path / "t.json")
    again = read_results(tmp_path / "t.json")
    assert again == results
    # a hundred rows of two classes are 13 bytes
    assert (tmp_path / "t.json").stat().st_size < 300 * len(results.cells) + 1000


def test_results_refuse_other_rows(tmp_path: Path) -> None:
    cells = [replace(_cell("adapter", "mrpc", 1, 50), predictions=[0, 1])]
    with pytest.raises(DataError, match="adapter on mrpc has 2 predictions"):
        _results(cells).write(tmp_path / "t.json")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 2}'])
def test_a_file_without_cells(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match=r"t\.json holds no cells of a table"):
        read_results(tmp_path / "t.json")


def _study(method: str, task: str, seed: int, dev: float, **fields: Any) -> dict[str, Any]:
    key = {"method": method, "task": task, "seed": seed, "shots": 10, "variant": "default", "lr": 1e-3, "epochs": 10}
    fields = {"loss": 1.0, **fields}
    loss = fields.pop("loss")
    return {
        "cell": key | fields,
        "metric": "accuracy",
        "dev": {"accuracy": dev, "loss": loss},
        "test": {"accuracy": 0.0},
        "predictions": [0, 1, 2],
        "truths": [0, 1, 1],
        "steps": 5,
        "seconds": 2.0,
        "trained_parameters": 99,
    }


def test_rates_are_chosen_by_dev_shots_of_all_tasks_and_ties_by_loss() -> None:
    plan = replace(
        PLAN, arms=tuple(_arms("adapter", "acts", "acts@sum")), rates={"adapter": (1.0, 2.0), "mera": (1.0, 2.0)}
    )
    cells = [
        _study("adapter", "mrpc", 201, 0.9, lr=1.0),
        _study("adapter", "mnli", 201, 0.3, lr=1.0),
        _study("adapter", "mrpc", 201, 0.7, lr=2.0),
        _study("adapter", "mnli", 201, 0.6, lr=2.0),
        _study("acts", "mrpc", 201, 0.5, lr=1.0, loss=0.7),
        _study("acts", "mrpc", 201, 0.5, lr=2.0, loss=0.6),
    ]
    assert choose_rates(plan, cells) == {"head/adapter/": 2.0, "head/mera/acts": 2.0}
    cells[-1]["dev"]["loss"] = 0.7
    assert choose_rates(plan, cells)["head/mera/acts"] == 1.0
    with pytest.raises(DataError, match="head/mera/acts: has no cell on held splits"):
        choose_rates(plan, cells[:-2])


def test_one_rate_needs_no_choice() -> None:
    plan = replace(PLAN, arms=tuple(_arms("zero", "acts+")), rates={"zero": (1.0,), "mera": (3.0,)})
    assert choose_rates(plan, []) == {"head/zero/acts+": 1.0, "head/mera/acts+": 3.0}


def test_cells_of_a_table() -> None:
    kept, truths = table_cells([_study("acts", "mnli", 5, 0.5), _study("acts", "mnli", 1, 0.5)])
    assert truths == {"mnli": [0, 1, 1]}
    assert [(cell.seed, cell.arm, cell.steps, cell.trained) for cell in kept] == [
        (1, "acts", 5, 99),
        (5, "acts", 5, 99),
    ]
    assert kept[0].setting == {"variant": "default", "lr": 1e-3, "epochs": 10}
    other = _study("avg", "mnli", 1, 0.5) | {"truths": [0, 0, 0]}
    with pytest.raises(DataError, match="avg on mnli, seed 1: was tested on other rows"):
        table_cells([_study("acts", "mnli", 1, 0.5), other])


# -- tables --------------------------------------------------------------------------------------------------------


def test_scores() -> None:
    results = _results(_three("adapter", 70, 50) + _three("acts", 80, 60), minutes=12)
    text = scores_table(results, PLAN, _arms("adapter", "fusion", "acts"))
    adapter, acts, trivial = _rows(text)
    assert adapter["mrpc, 10 shots"].startswith("70.0 [")
    assert (acts["mean"], acts["trained"]) == ("70.0", "1,234")
    assert (trivial["mrpc, 10 shots"], trivial["mnli, 10 shots"]) == ("60.0", "34.0")
    assert "12 minutes" in text
    assert "Failed setup" not in text


def test_intervals_hold_splits_and_examples() -> None:
    results = _results(_three("adapter", 70, 50))
    found = estimate(results, _arms("adapter")[0], ("mrpc", 10))
    assert found is not None
    splits_alone = mean_interval([0.69, 0.70, 0.71])
    assert found.value == pytest.approx(splits_alone.mean)
    assert found.high - found.value > splits_alone.half_width
    assert majority(results, "mrpc") == 0.6


def test_intervals_end_where_accuracies_do() -> None:
    cells = [_cell(arm, "mrpc", seed, right) for seed, right in ((1, 1), (2, 99)) for arm in ("adapter", "acts")]
    cells += [_cell("wts", "mrpc", seed, right) for seed, right in ((1, 99), (2, 1))]
    (adapter, wts), results = _arms("adapter", "wts"), _results(cells)
    found, gain = estimate(results, adapter, ("mrpc", 10)), estimate(results, wts, ("mrpc", 10), adapter)
    assert found is not None and gain is not None
    assert (found.low, found.high, gain.low, gain.high) == (0, 1, -1, 1)


def test_gains_are_paired_and_corrected() -> None:
    cells = _three("adapter", 55, 50)
    # one method is better on the same rows every time; the other only on average
    better = [replace(_cell("acts", cell.task, cell.seed, 95), shots=10) for cell in cells]
    unsure = [_cell("wts", task, seed, right) for task in TRUTHS for seed, right in ((1, 30), (2, 95), (3, 60))]
    text = gains_table(_results(cells + better + unsure), PLAN, _arms("adapter", "wts", "acts"))
    wts, acts = _rows(text)
    assert [row["over the baseline"] for row in (wts, acts)] == ["MerA Wts", "MerA Acts"]
    assert acts["mrpc, 10 shots"].startswith("+40.0 [+")
    assert acts["mrpc, 10 shots"].endswith(" *")
    assert not wts["mrpc, 10 shots"].endswith("*")


def test_a_weak_baseline_and_a_failed_setup_are_called_so() -> None:
    cells = _three("adapter", 62, 35) + _three("acts", 70, 37)
    text = scores_table(_results(cells), PLAN, _arms("adapter", "acts"))
    assert "**Failed setup:** no method is 5 points above the majority class: mnli, 10 shots." in text
    assert "The baseline alone is not 5 points above the majority class: mrpc, 10 shots." in text


def test_the_scale_is_chosen_on_dev_shots_of_each_split() -> None:
    dev = {"acts": (0.5, 0.9, 0.7), "acts@2": (0.6, 0.1, 0.7), "acts@sum": (0.6, 0.2, 0.7)}
    right = {"acts": 50, "acts@2": 60, "acts@sum": 70}
    cells = [
        _cell(
            name, "mrpc", seed, right[name], dev={"accuracy": values[seed - 1], "loss": 0.2 if "sum" in name else 0.5}
        )
        for name, values in dev.items()
        for seed in (1, 2, 3)
    ]
    found = estimate(_results(cells), _arms("acts@dev")[0], ("mrpc", 10))
    assert found is not None
    # split 1: equal accuracy, lower loss at the sum; 2: the mean; 3: the sum by its loss
    assert found.value == pytest.approx((0.7 + 0.5 + 0.7) / 3)


def test_sources() -> None:
    facts = {"track": "QA", "rows": 1886, "removed": 12, "metric": "accuracy", "score": 0.64, "majority": 0.62}
    (row,) = _rows(sources_table(_results([], sources={"boolq": facts | {"seconds": 90, "seed": 1}})))
    assert (row["source"], row["learned"], row["left out"], row["minutes"]) == ("boolq", "no", "12", "1.5")


def test_no_cell_no_table(tmp_path: Path) -> None:
    for make in (scores_table, gains_table):
        with pytest.raises(DataError, match="there is no cell"):
            make(_results([]), PLAN, PLAN.arms)
    with pytest.raises(DataError, match="there is no cell to draw"):
        draw_figure("1", _results([]), PLAN, tmp_path / "f.png")


@pytest.mark.parametrize("number", ["1", "2"])
def test_figures(number: str, tmp_path: Path) -> None:
    results = _results(_three("adapter", 70, 50) + _three("single", 80, 60))
    draw_figure(number, results, PLAN, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.width > 500


def test_the_documents_have_the_places() -> None:
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    names = [f"mera-table{name}" for name in "123"] + [f"mera-figure{name}" for name in FIGURES]
    assert all(text.count(f"<!-- generated: {name} -->") == 1 for name in names)


def test_another_backbone_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="--model some/where: give --out too"):
        mera.main(["--table", "1", "--model", "some/where"])


# -- end to end ----------------------------------------------------------------------------------------------------


def _few(plan: Plan, *names: str) -> Plan:
    return replace(plan, arms=tuple(arm for arm in plan.arms if arm.name in names))


def _written(folder: Path) -> dict[Path, int]:
    """When cells and sources were written."""
    files = (folder / "runs").rglob("*.json")
    return {path: path.stat().st_mtime_ns for path in files if path.name != "study.json"}


def test_tiny_table_goes_on_where_it_stopped(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (
        "zero",
        "full",
        "fusion",
        "adapter",
        "single",
        "avg",
        "acts+",
        "acts+@2",
        "acts+@sum",
        "acts+@dev",
        "select",
    )
    monkeypatch.setitem(PLANS, "1", _few(PLANS["1"], *names))
    options = ["--table", "1", "--tiny", "--threads", "1", "--workers", "1", "--out", str(tmp_path)]
    mera.main(options)
    results = read_results(tmp_path / "table1.json")
    plan = PLANS["1"].tiny()
    counts = [len(plan.settings if arm.main else plan.fewest) for arm in plan.run]
    assert len(results.cells) == sum(counts) * len(plan.seeds)
    assert {len(truths) for truths in results.truths.values()} == {plan.test_rows}
    assert {task: sum(counts.values()) for task, counts in results.facts["singles"].items()} == dict.fromkeys(
        plan.tasks, len(plan.seeds)
    )
    written = _written(tmp_path)
    mera.main(options)
    again = read_results(tmp_path / "table1.json")
    assert len(written) > len(results.cells)
    assert _written(tmp_path) == written
    assert [np.asarray(cell.predictions).tolist() for cell in again.cells] == [
        cell.predictions for cell in results.cells
    ]
    mera.main(["--figure", "1", "--report", "--tiny", "--out", str(tmp_path)])
    assert (tmp_path / "figure1.png").is_file()
    assert "Adapter from scratch" in capsys.readouterr().out


def test_tiny_tracks_take_the_rates_of_the_first_table(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLANS, "1", _few(PLANS["1"], "adapter", "acts"))
    monkeypatch.setitem(PLANS, "3", _few(PLANS["3"], "adapter", "QA/acts"))
    mera.main(["--table", "3", "--tiny", "--threads", "1", "--workers", "1", "--out", str(tmp_path)])
    results = read_results(tmp_path / "table3.json")
    assert set(results.facts["rates"]) == {"head/adapter/", "head/mera/acts"}
    assert set(results.facts["sources"]) == {"boolq", "squad_v1"}
    assert {path.name for path in (tmp_path / "runs" / "table-3").iterdir()} == {"report-head"}
    monkeypatch.setitem(PLANS, "3", replace(PLANS["3"], arms=PLANS["2"].arms[:1]))
    with pytest.raises(UsageError, match="rates_of = '1': has no arm of head/full/"):
        mera.main(["--table", "3", "--tiny", "--threads", "1", "--workers", "1", "--out", str(tmp_path)])


def test_tiny_prompts(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{mode}/{method}" for mode in ("head", "prompt", "prompt-demo") for method in ("adapter", "select")]
    monkeypatch.setitem(PLANS, "2", _few(PLANS["2"], *names))
    mera.main(["--table", "2", "--tiny", "--threads", "1", "--workers", "1", "--out", str(tmp_path)])
    results = read_results(tmp_path / "table2.json")
    assert {cell.arm for cell in results.cells} == set(names)
