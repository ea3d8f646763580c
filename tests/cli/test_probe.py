"""``probe`` from the command line: what it writes, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForMaskedLM

from peft_lightning.cli.main import main
from tests.analysis.test_encoder import folder
from tests.analysis.test_probe import toy_task
from tests.cli.test_tools import refused


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


def sentences(path: Path, seed: int = 0) -> str:
    task = toy_task(seed=seed)
    rows = [
        f"{split}\t{task.classes[label]}\t{text}"
        for split in task.texts
        for text, label in zip(task.texts[split], task.labels[split], strict=True)
    ]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command that works, but for ``--out``."""
    data = ",".join(sentences(tmp_path / f"{name}.tsv", seed) for seed, name in enumerate(("tense", "number")))
    return ["probe", "--backbone", folder(tmp_path / "one"), "--data", data]


def test_it_measures_draws_and_compares(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [
        folder(tmp_path / "two", auto=AutoModelForMaskedLM, initializer_range=0.5),
        folder(tmp_path / "deep", num_hidden_layers=5),
    ]
    out = tmp_path / "out"
    main([*words, "--out", str(out), "--compare", *others, "--shade", "2-3", "--max_length", "16", "--seed", "7"])
    printed = capsys.readouterr().out
    assert "majority class" in printed and printed.endswith(f"wrote {out}\n")
    assert {path.name for path in out.iterdir()} == {"probe.json", "probe.png"}
    report: dict[str, Any] = json.loads((out / "probe.json").read_text())
    assert (
        report["seed"] == 7
        and report["pooling"] == "mean"
        and {entry["max_length"] for entry in report["backbones"]} == {16}
    )
    assert report["tasks"]["tense"]["rows"] == {"tr": 90, "va": 40, "te": 50}
    assert report["tasks"]["tense"]["majority"] == toy_task().majority
    assert [(entry["label"], entry["layers"]) for entry in report["backbones"]] == [("one", 3), ("two", 3), ("deep", 5)]
    assert len({entry["identity"]["weights"] for entry in report["backbones"]}) == 3
    one, two, deep = (entry["tasks"]["number"] for entry in report["backbones"])
    assert len(one["accuracy"]) == 4 and len(deep["accuracy"]) == 6
    assert one["accuracy"][0] > 0.95
    expected = [b - a for a, b in zip(one["accuracy"], two["accuracy"], strict=True)]
    assert two["gap"]["mean"] == pytest.approx(expected)
    assert "gap" not in one and "gap" not in deep  # layers of other depths do not correspond
    with Image.open(out / "probe.png") as picture:
        assert picture.width > 800


def test_nothing_is_written_where_something_is(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "is not empty" in refused(*words, "--out", str(tmp_path / "out"), status=2, capsys=capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_bad_row_is_one_line_and_leaves_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "number.tsv", "a") as file:
        file.write("tr\tgood\n")
    message = refused(*words, "--out", str(tmp_path / "out"), status=1, capsys=capsys)
    assert "number.tsv, line 181: has 2 columns" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pooling", "max"], "invalid choice: 'max'"),
        (["--max_length", "99"], "max_length = 99: must be from 3 to 40"),
        (["--batch_size", "0"], "batch_size = 0: must be at least 1"),
        (["--seed", "-1"], "seed = -1: must be at least 0"),
        (["--shade", "3"], "shade = '3': must be two numbers of layers from 1, as 6-11"),
        (["--shade", "3-2"], "shade = '3-2'"),
        (["--shade", "2-4"], "shade = '2-4': must end at layer 3"),
        (["--compare", "/ghost/model"], "/ghost/model"),
        (["--data", ""], "data = '': must be files of different names"),
        (["--data", "/ghost.tsv"], "data = /ghost.tsv: there is no such file"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_refusals(
    more: list[str], message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(*words, "--out", str(tmp_path / "out"), *more, status=2, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_names_twice(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "each once" in refused(*words, *out, "--compare", words[2], status=2, capsys=capsys)
    file = tmp_path / "tense.tsv"
    same = refused(*words, *out, "--data", f"{file},{file}", status=2, capsys=capsys)
    assert "must be files of different names" in same
    assert "required: --backbone, --data, --out" in refused("probe", status=2, capsys=capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["probe", "--help"])
    assert caught.value.code == 0 and "--compare" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "  probe" in capsys.readouterr().out
