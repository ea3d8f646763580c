"""Whole studies: what is finished is not repeated, what fails stops nothing else, and a cell is what ``fit`` makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from peft_lightning import FewShotDataModule, SparseAdapterModule, export_adapter, load
from peft_lightning.backbones.sharing import SharedBackbones
from peft_lightning.cli.main import main
from peft_lightning.errors import DataError, UsageError
from peft_lightning.reading.seal import SEAL
from peft_lightning.study import work
from peft_lightning.study.grid import merged_settings, read_grid
from peft_lightning.study.results import StudyFolder, majorities, read_study
from peft_lightning.study.runner import StudyWarning, run_study
from peft_lightning.study.together import run_together
from peft_lightning.study.work import Work
from tests.study.helpers import FULL, SPARSE, folder, grid_of
from tests.toy import toy_sources, trainer

PRUNED = merged_settings(SPARSE, {"init_args": {"prune": {"sparsity": 0.5}}})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder(tmp_path_factory.mktemp("study") / "backbone")


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


def run(values: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    return run_study(read_grid(values), output)


def test_side_by_side_equals_one_by_one_and_the_backbone_stays(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    check = SharedBackbones.check

    def compare(shared: SharedBackbones) -> None:
        held = next(iter(shared._held.values())).backbone
        seen.append(([p.clone() for p in held.parameters()], list(held.parameters())))
        check(shared)

    monkeypatch.setattr(SharedBackbones, "check", compare)
    methods = {"dense": SPARSE, "pruned": PRUNED, "full": FULL, "untrained": {**SPARSE, "epochs": [0]}}
    grid = grid_of(backbone, methods, lr=[5e-3, 1e-3])
    many, one = run(grid, tmp_path / "many"), run({**grid, "side_by_side": 1}, tmp_path / "one")
    assert len(many) == 2 * (3 * 2 + 1)
    before, after = seen[0][0], seen[-1][1]
    for first, last in zip(before, after, strict=True):
        assert_close(first, last, rtol=0, atol=0)
    for left, right in zip(many, one, strict=True):
        assert left["cell"] == right["cell"] and right["side_by_side"] == 1
        assert_close(left["losses"], right["losses"], rtol=0, atol=1e-5)
        same = sum(a == b for a, b in zip(left["predictions"], right["predictions"], strict=True))
        assert same >= 0.99 * 100 == 0.99 * len(left["predictions"])
    assert {c["cell"]["method"]: c["side_by_side"] for c in many} == {
        "dense": 8,
        "pruned": 8,
        "full": 1,
        "untrained": 2,
    }
    assert {c["cell"]["method"]: c["steps"] for c in many} == {"dense": 30, "pruned": 30, "full": 30, "untrained": 0}


@pytest.mark.parametrize("select", ["last", "best"])
def test_steps_end_inside_an_epoch_alone_and_side_by_side(backbone: str, tmp_path: Path, select: str) -> None:
    """Three batches an epoch: seven steps end after the first of the third one, six with the second one."""
    dull = {**SPARSE, "init_args": {**SPARSE["init_args"], "optim": {"warmup": 0.1}}}
    grid = grid_of(backbone, {"m": dull}, epochs=None, steps=[6, 7], select=select)
    many, one = run(grid, tmp_path / "many"), run({**grid, "side_by_side": 1}, tmp_path / "one")
    assert [(r["steps"], len(r["losses"]), r["cell"]["steps"]) for r in many] == 2 * [(6, 6, 6), (7, 7, 7)]
    assert {record["side_by_side"] for record in many} == {2}
    for left, right in zip(many, one, strict=True):
        assert (left["steps"], left["epoch"]) == (right["steps"], right["epoch"])
        assert_close(left["losses"], right["losses"], rtol=0, atol=1e-5)
        assert left["test"]["loss"] == pytest.approx(right["test"]["loss"], abs=1e-5)
    epochs = run({**grid, "steps": None, "epochs": [2]}, tmp_path / "epochs")
    for left, right in zip(epochs, many[::2], strict=True):
        assert_close(left["losses"], right["losses"], rtol=0, atol=1e-5)
    run(grid, tmp_path / "epochs")
    assert len(list((tmp_path / "epochs" / "cells").iterdir())) == 2 + 4


def test_a_record_is_complete_and_in_the_file(backbone: str, tmp_path: Path) -> None:
    (record,) = run(grid_of(backbone, {"m": SPARSE}, seeds=[3], epochs=[2]), tmp_path)
    (path,) = (tmp_path / "cells").iterdir()
    written = {name: value for name, value in json.loads(path.read_text()).items() if name != SEAL}
    assert written == record == read_study(tmp_path)[0]
    assert record["cell"] == {
        "method": "m", "variant": "default", "task": "toy_sentiment", "shots": 10, "seed": 3, "lr": 5e-3, "epochs": 2,
    }  # fmt: skip
    assert (record["metric"], record["steps"], record["epoch"], len(record["losses"])) == ("accuracy", 6, 2, 6)
    right = sum(a == b for a, b in zip(record["predictions"], record["truths"], strict=True))
    assert record["test"]["accuracy"] == pytest.approx(right / 100)
    assert set(record["dev"]) == set(record["test"]) == {"accuracy", "loss"}
    most = max(record["truths"].count(label) for label in (0, 1))
    assert majorities(tmp_path)["toy_sentiment"]["accuracy"] == pytest.approx(most / 100)
    assert record["trained_parameters"] > 0 and record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["SparseAdapterModule", "FineTuneModule", "PruneLoRAModule"])
def test_a_cell_is_what_fit_and_test_give(backbone: str, tmp_path: Path, cache_dir: Path, name: str) -> None:
    """With dropout, and also the best epoch: the same weights, so the same metrics."""
    entry = {"class_path": name}
    grid = grid_of(backbone, {"m": entry}, seeds=[13], lr=[5e-3], epochs=[6], side_by_side=1, select="best")
    (record,) = run(grid, tmp_path / "study")
    options = {**grid["data"], "shots": 10, "task": "toy_sentiment", "seeds": [13], "shot_seed": 13}
    config = {
        "seed_everything": 13,
        "model": {"class_path": name, "init_args": {"backbone": grid["backbone"], "optim": {"lr": 5e-3}}},
        "data": {"class_path": "FewShotDataModule", "init_args": options},
        "trainer": {"max_epochs": 6, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml"), "--run_dir", str(tmp_path / "run")])
    found = tmp_path / "run" / "best.ckpt"
    rows: Any = FewShotDataModule(tokenizer="toy", **options)
    (scores,) = trainer().test(load(str(found)), datamodule=rows, verbose=False)
    assert record["epoch"] * 3 == torch.load(found, weights_only=True)["global_step"]
    assert record["test"]["accuracy"] == pytest.approx(scores["test/accuracy"])
    assert record["test"]["loss"] == pytest.approx(scores["test/loss"], abs=1e-6)


def test_cells_have_the_names_of_the_grid_that_asks(backbone: str, tmp_path: Path) -> None:
    """Two methods that are one, and a method that was renamed: one file each, under every name."""
    alike = grid_of(backbone, {"one": SPARSE, "two": SPARSE}, seeds=[3], epochs=[1])
    run(alike, tmp_path)
    assert [record["cell"]["method"] for record in read_study(tmp_path)] == ["one", "two"]
    renamed = run(grid_of(backbone, {"three": SPARSE}, seeds=[3], epochs=[1]), tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 1
    assert [record["cell"]["method"] for record in renamed] == ["three"]
    assert [record["cell"]["method"] for record in read_study(tmp_path)] == ["three"]


def test_what_decides_a_cell_and_is_no_number(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that is named without a slash, and the backbone's configuration."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(backbone, "encoder")
    write_source("source", backbone, seed=1)
    merged = {"class_path": "MerAModule", "init_args": {"sources": ["source"]}}
    grid = grid_of("encoder", {"m": merged}, seeds=[3], epochs=[1])
    assert len(run(grid, tmp_path / "out")) == len(list((tmp_path / "out" / "cells").iterdir())) == 1
    write_source("source", backbone, seed=2)
    run(grid, tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2
    config = json.loads(Path("encoder/config.json").read_text())
    Path("encoder/config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    run(grid, tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3


def write_source(path: str, backbone: str, seed: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    options: dict[str, Any] = {"adapter": {"kind": "pfeiffer", "bottleneck": 4}, "prune": {"sparsity": 0.0}}
    encoder: Any = {"name": backbone, "tokenizer": "toy"}
    module = SparseAdapterModule("toy_pairs", encoder, seed=seed, **options)
    export_adapter(module, path, format="adapterhub", head=False)


def test_two_studies_do_not_share_a_folder(backbone: str, tmp_path: Path) -> None:
    with StudyFolder(tmp_path).alone(), pytest.raises(DataError, match="another study is at work there"):
        run(grid_of(backbone, {"m": SPARSE}, seeds=[3], epochs=[1]), tmp_path)


def test_a_cell_without_results_is_run_again(backbone: str, tmp_path: Path) -> None:
    grid = grid_of(backbone, {"m": SPARSE}, seeds=[3], epochs=[1])
    (record,) = run(grid, tmp_path)
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text(json.dumps({"test": {}}))
    (again,) = run(grid, tmp_path)
    assert again["predictions"] == record["predictions"] and json.loads(path.read_text()).items() >= again.items()


def test_a_killed_study_goes_on_and_repeats_nothing(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(backbone, {"a": SPARSE, "b": PRUNED}, epochs=[1], side_by_side=2)
    ran: list[list[Any]] = []
    whole = Work.run

    def dies(work: Any, group: Any, tick: Any) -> Any:
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append([cell.key for cell in group])
        return whole(work, group, tick)

    monkeypatch.setattr(Work, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        run(grid, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(files) == 2

    def notes(work: Any, group: Any, tick: Any) -> Any:
        ran.append([cell.key for cell in group])
        return whole(work, group, tick)

    monkeypatch.setattr(Work, "run", notes)
    records = run(grid, tmp_path)
    assert len(records) == 4 and {path: path.stat().st_mtime_ns for path in files} == files
    again = [key for group in ran for key in group]
    assert len(again) == 4 and all(again.count(key) == 1 for key in again)
    ran.clear()
    assert run({**grid, "side_by_side": 1}, tmp_path) == records and not ran
    damaged = next(iter(files))
    damaged.write_text(damaged.read_text()[:40])
    # The last digits may differ in other company.
    assert [r["truths"] for r in run(grid, tmp_path)] == [r["truths"] for r in records] and len(ran) == 1


def test_what_decides_a_result_makes_another_cell(backbone: str, tmp_path: Path) -> None:
    grid = grid_of(backbone, {"a": SPARSE}, seeds=[1], epochs=[0])

    def files(values: dict[str, Any]) -> int:
        run(values, tmp_path / "out")
        return len(list((tmp_path / "out" / "cells").iterdir()))

    assert files(grid) == 1
    moved = shutil.copytree(backbone, tmp_path / "elsewhere")
    same: list[dict[str, Any]] = [
        {"side_by_side": 3},
        {"backbone": {"name": str(moved)}},
        {"data": {"eval_batch_size": 7}},
        {"seeds": [1]},
    ]
    assert files({**grid, "methods": {"other name": SPARSE}}) == 1
    for change in same:
        assert files(merged_settings(grid, change)) == 1, change
    other: list[dict[str, Any]] = [
        {"data": {"shots": [11]}},
        {"data": {"test_rows": 99}},
        {"data": {"shots_mode": "total"}},
        {"data": {"max_length": 15}},
        {"tasks": ["toy_pairs"]},
        {"precision": "bf16-mixed"},
        {"select": "best"},
        {"backbone": {"dtype": "bfloat16"}},
        {"backbone": {"name": folder(tmp_path / "third", initializer_range=0.3)}},
        {"methods": {"a": {"init_args": {"adapter": {"init_std": 0.3}}}}},
        {"methods": {"a": {"init_args": {"head": "linear"}}}},
        {"seeds": [2]},
        {"epochs": [1]},
    ]
    for number, change in enumerate(other, start=2):
        assert files(merged_settings(grid, change)) == number, change


def test_a_merged_adapter_and_the_content_of_its_sources(tmp_path: Path) -> None:
    """MerA's cells go side by side too; when a source's files change, so does the cell."""
    model = {"name": folder(tmp_path / "backbone"), "tokenizer": "toy"}
    sources = [shutil.copytree(path, tmp_path / f"source{i}") for i, path in enumerate(toy_sources(model))]
    merged: dict[str, Any] = {
        "class_path": "MerAModule",
        "init_args": {"sources": [str(path) for path in sources], "merge": {"preset": "acts", "tokens": 32}},
    }
    grid = grid_of(model["name"], {"m": {**merged, "init_args": {**merged["init_args"], "head_dropout": 0.0}}})
    many = run(grid, tmp_path / "many")
    one = run({**grid, "side_by_side": 1}, tmp_path / "one")
    assert [record.get("error") for record in many] == [None, None]
    assert {record["side_by_side"] for record in many} == {2}
    for left, right in zip(many, one, strict=True):
        assert_close(left["losses"], right["losses"], rtol=0, atol=1e-5)
    (sources[0] / "note.txt").write_text("other")
    run(grid, tmp_path / "one")
    assert len(list((tmp_path / "one" / "cells").iterdir())) == 4


def test_failures_are_recorded_tried_again_and_stop_nothing(backbone: str, tmp_path: Path) -> None:
    bad = merged_settings(SPARSE, {"init_args": {"prune": {"score": "given", "sparsity": 0.5}}})
    grid = grid_of(backbone, {"good": SPARSE, "bad": bad}, epochs=[1])
    records = run(grid, tmp_path)
    errors = {r["cell"]["method"]: r.get("error", "") for r in records}
    assert errors["good"] == ""
    assert "masks that come with a file" in errors["bad"]
    assert len(read_study(tmp_path)) == 2
    (path,) = {
        p for p in (tmp_path / "cells").iterdir() if "masks that" in p.read_text() and '"seed": 13' in p.read_text()
    }
    before = path.stat().st_mtime_ns
    run(grid, tmp_path)
    assert path.stat().st_mtime_ns > before


def test_rows_and_sources_are_looked_at_before_the_first_cell(backbone: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "mrpc").mkdir(parents=True)
    row = json.dumps({"sentence1": "the cat", "sentence2": "the dog", "label": 0})
    for split in ("train", "dev"):
        (tmp_path / "data" / "mrpc" / f"{split}.jsonl").write_text(f"{row}\n")
    merged = {"class_path": "MerAModule", "init_args": {"sources": [str(tmp_path / "missing")]}}
    write_source(str(tmp_path / "other"), folder(tmp_path / "wide", hidden_size=48), seed=1)
    wide = {**merged, "init_args": {"sources": [str(tmp_path / "other")]}}
    methods = {"a": SPARSE, "m": merged, "w": wide}
    with pytest.raises(DataError, match="nothing is run before this is mended: ") as caught:
        run(grid_of(backbone, methods, data={"shots": [10, 2000]}), tmp_path / "out")
    problems = str(caught.value).split(": ", 1)[1].split("; method ")
    assert problems[0].startswith("task toy_sentiment, 2000 shots: toy_sentiment/train: class ")
    assert problems[0].endswith("wanted: 2000") and problems[0].count("wanted") == 1
    assert problems[1].startswith("m (default), task toy_sentiment: ") and "missing" in problems[1]
    assert problems[2].startswith("w (default), task toy_sentiment: ") and "hidden_size" in problems[2]
    assert "10 shots" not in str(caught.value) and not (tmp_path / "out" / "study.json").exists()
    mine = {"mrpc": {"root": str(tmp_path / "data")}}
    with pytest.raises(DataError, match=r"has no split 'validation' .* dev, train; data.splits.test chooses one"):
        run({**grid_of(backbone, {"a": SPARSE}), "tasks": mine}, tmp_path / "out")
    mine["mrpc"]["splits"] = {"test": "dev"}  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"task mrpc, 10 shots: .*class 'equivalent' has 0 different rows"):
        run({**grid_of(backbone, {"a": SPARSE}), "tasks": mine}, tmp_path / "out")


def test_another_grid_s_cells_are_not_replaced_without_a_word(
    backbone: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    grid = grid_of(backbone, {"a": SPARSE, "b": PRUNED}, seeds=[3], epochs=[0])
    other = {**grid, "methods": {"c": {**FULL, "epochs": [0]}}}
    for again in (grid, grid, {**grid, "seeds": [3, 4]}):  # made, gone on with, extended
        run(again, tmp_path)
    assert not [one for one in recwarn if one.category is StudyWarning]
    with pytest.warns(
        StudyWarning, match=rf"output = {tmp_path}: holds 4 finished .*method a, b; task toy_sentiment\)"
    ):
        run(other, tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 5


def test_what_is_too_much_for_one_batch_is_halved(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    whole = run_together

    def narrow(prepared: Any, *rest: Any) -> Any:
        sizes.append(len(prepared))
        if len(prepared) > 1:
            raise RuntimeError("out of memory")
        return whole(prepared, *rest)

    grid = grid_of(backbone, {"a": SPARSE}, lr=[1e-3, 2e-3], epochs=[1])
    wanted = run(grid, tmp_path / "whole")
    monkeypatch.setattr(work, "run_together", narrow)
    found = run(grid, tmp_path / "parts")
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    for one, other in zip(found, wanted, strict=True):
        assert_close(one["losses"], other["losses"], rtol=0, atol=1e-5)


def test_what_is_wrong_with_the_whole_ends_it_at_once(backbone: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"root is 'nowhere'; allowed: a folder that exists"):
        run(grid_of(backbone, {"a": SPARSE}, data={"root": "nowhere"}), tmp_path)
    with pytest.raises(UsageError, match=r"methods.a \(default\): adapter.kind = 'none'"):
        run(grid_of(backbone, {"a": merged_settings(SPARSE, {"init_args": {"adapter": {"kind": "none"}}})}), tmp_path)
    with pytest.raises(UsageError, match=r"backbone.name = 'nowhere'"):
        run(grid_of("nowhere", {"a": SPARSE}), tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(DataError, match=r"holds no study"):
        read_study(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"study.device = 'cuda': there is none; allowed here: auto, cpu"):
            run(grid_of(backbone, {"a": SPARSE}, device="cuda"), tmp_path)
