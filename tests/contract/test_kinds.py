"""Every method on every kind of task: learned, kept in files, and no result hangs on batches, ranks or precision."""

from __future__ import annotations

import math
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import load
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.tasks import kinds
from peft_lightning.tasks.table import get_task
from tests.contract.kinds import TOYS, data_of, epochs_of, module_of, pairs, rows_of, shuffled, stretched
from tests.contract.kinds_worker import main
from tests.toy import trainer

ROOT = Path(__file__).resolve().parents[2]
KINDS = pytest.mark.parametrize("kind", TOYS)
PAIRS = pytest.mark.parametrize(
    ("kind", "method"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1].__name__}") for pair in pairs()]
)


@dataclass(frozen=True)
class Learned:
    """A fit that is over: its method, kind and folder, the module as it ended, the data, the last validation."""

    method: Any
    kind: str
    folder: Path
    module: Any
    source: Any
    scores: dict[str, float]


def fitted(
    kind: str, method: Any, rows: Any, epochs: int, folder: Path | None = None
) -> tuple[Any, Any, dict[str, float]]:
    """A module at the end of a fit on ``rows``, the data, and the scores of the validation that closes the fit."""
    module, source = module_of(kind, method), data_of(kind, rows)
    fit = trainer(folder, every_n_steps=1000, max_epochs=epochs, check_val_every_n_epoch=epochs)
    fit.fit(module, datamodule=source)
    return module, source, {name: float(value) for name, value in fit.callback_metrics.items()}


def pair(kind: str, method: Any) -> Any:
    # a worker that has learned a pair runs all of its tests
    name = f"{kind}-{method.__name__}"
    return pytest.param((kind, method), id=name, marks=pytest.mark.xdist_group(name))


@pytest.fixture(scope="module", params=[pair(kind, method) for kind, method in pairs()])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """A pair of a kind and a method after its fit on the toy task."""
    kind, method = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{method.__name__}")
    return Learned(method, kind, folder, *fitted(kind, method, rows_of(kind), epochs_of(kind, method), folder))


def test_every_kind_has_a_toy_task() -> None:
    assert set(TOYS) == {info.name for info in pkgutil.iter_modules(kinds.__path__)} - {"base"}
    assert {kind: get_task(toy.task).kind for kind, toy in TOYS.items()} == {kind: kind for kind in TOYS}


# -- learning


def test_the_toy_task_is_learned(learned: Learned) -> None:
    assert learned.scores[learned.module.monitor] >= 0.95
    if learned.kind == "generate":
        rows = learned.source.rows["validation"]
        texts = [answer["summary"] for answer in learned.module.predict([row["text"] for row in rows])]
        assert sum(text == row["copy"] for text, row in zip(texts, rows, strict=True)) >= 0.95 * len(rows)


@PAIRS
def test_shuffled_labels_are_not_learned(kind: str, method: Any) -> None:
    rows, label = rows_of(kind), TOYS[kind].label
    changed = shuffled(kind, rows["train"])
    assert sum(new[label] != old[label] for new, old in zip(changed, rows["train"], strict=True)) > len(changed) / 3
    module, source, scores = fitted(kind, method, {**rows, "train": changed}, epochs=2)
    # four standard errors of a mean of scores in [0, 1], whose deviation is 1/2 at most; a correlation's is 1
    room = 4 * (1.0 if kind == "regress" else 0.5) / math.sqrt(len(rows["validation"]))
    chance = TOYS[kind].chance
    if chance is None:
        chance = baseline_scores(module, source, "validation")[module.task.metrics[0]]
    assert scores[module.monitor] <= chance + room < 0.95


# -- files


def test_the_best_checkpoint_tests_alike(learned: Learned) -> None:
    expected = trainer().test(learned.module, datamodule=learned.source, verbose=False)
    fresh = load(learned.folder / "best.ckpt")
    assert type(fresh) is learned.method and fresh is not learned.module
    assert trainer().test(fresh, datamodule=learned.source, verbose=False) == expected
    assert set(expected[0]) == {"test/loss", *(f"test/{name}" for name in learned.module.task.metrics)}
    assert expected[0][f"test/{learned.module.task.metrics[0]}"] > 0.9


def test_a_row_does_not_depend_on_its_batch(learned: Learned) -> None:
    """The answers of ``predict`` are a row's own: whether it is alone, among 7, or beside its likes."""
    rows = stretched(learned.kind, learned.source.rows["test"][:23])
    fresh = module_of(learned.kind, learned.method)  # not yet so sure of itself that probabilities are 0 and 1
    if hasattr(fresh, "merge_sources"):
        fresh.merge_sources([next(learned.source.batches("train"))])
    for module in (fresh, learned.module):
        alone, among = (module.predict(rows, batch_size=size) for size in (1, 7))
        assert_alike(among, alone)
    source = data_of(learned.kind, {**learned.source.rows, "test": rows}, eval_batch_size=7)
    batches = trainer().predict(learned.module, datamodule=source) or []
    written = sorted((answer for batch in batches for answer in batch), key=lambda answer: answer["row"])
    assert [len(batch) for batch in batches] == [7, 7, 7, 2]
    assert [answer.pop("row") for answer in written] == list(range(23))
    assert_alike(written, alone)
    assert len({str(answer) for answer in alone}) > 1


def assert_alike(found: Any, expected: Any) -> None:
    """Numbers equal to 1e-5, everything else the same."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_alike(list(found.values()), list(expected.values()))
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == expected


# -- precision


@PAIRS
def test_a_step_in_bfloat16(kind: str, method: Any) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        module = module_of(kind, method)
        source = data_of(kind, rows_of(kind, {"train": 33, "validation": 1, "test": 1}), batch_size=16)
        options: dict[str, Any] = {"precision": precision}
        fit = trainer(max_steps=1, limit_val_batches=0, **options)
        fit.fit(module, datamodule=source)
        losses.append(float(fit.callback_metrics["train/loss"]))
        assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in module.trainable_parameters().values())
    assert math.isfinite(losses[1]) and losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# -- ranks


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process and two have written how every kind's fit ended."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "tests.contract.kinds_worker", str(folder), "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        main(folder, 1)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return folder


@pytest.mark.xdist_group("two ranks of every kind")
@KINDS
def test_two_ranks_end_as_one_process(kind: str, ends: Path) -> None:
    one, first, second = (torch.load(ends / f"{kind}-{end}.pt", weights_only=True) for end in ("1-0", "2-0", "2-1"))
    assert one["steps"] == first["steps"] == second["steps"] == 6
    assert first["scores"] == second["scores"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), f"ranks differ in {name}"
    assert_close(first["state"], one["state"], rtol=1e-5, atol=1e-5)
    # 17 rows: one that is repeated or lost would change these
    assert first["scores"] == pytest.approx(one["scores"], rel=1e-5, abs=1e-5)
    assert len(one["scores"]) == 1 + len(get_task(TOYS[kind].task).metrics)
