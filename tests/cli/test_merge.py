"""``merge`` from the command line: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from peft_lightning import merge_adapters
from peft_lightning.cli.main import main
from peft_lightning.cli.merge import _parser
from peft_lightning.functional.recipes import Recipe
from tests.cli.test_tools import refused
from tests.sources import backbone_folder, module, written

pytestmark = pytest.mark.filterwarnings("ignore:.*:peft_lightning.exchange.notes.ExchangeWarning")
TEXTS = ["the cat sleeps", "this red dog is not lazy", "fish", "the tiny horse looks brave"] * 10


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    return backbone_folder(tmp_path / "backbone")


@pytest.fixture
def family(backbone: str, tmp_path: Path) -> list[str]:
    made = [module(backbone, number, bottleneck=4 + number) for number in range(2)]
    formats = ("adapterhub", "peft_lightning")
    return [str(written(tmp_path / f"source_{i}", one, formats[i])) for i, one in enumerate(made)]


@pytest.fixture
def words(backbone: str, family: list[str]) -> list[str]:
    """A command that works, but for ``--output``."""
    return ["merge", "--adapters", *family, "--backbone", backbone, "--max_length", "16", "--tokens", "50"]


def same(one: Path, other: Path) -> bool:
    state, again = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    return state.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_with_a_file_of_texts(
    words: list[str], family: list[str], backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "texts.txt", tmp_path / "out"
    file.write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    options = [
        "--preset",
        "acts+",
        "--weights",
        "1",
        "-0.5",
        "--scale",
        "sum",
        "--set",
        "ridge=0.01",
        "reference=source_1",
    ]
    main([*words, "--texts", str(file), *options, "--batch_size", "4", "--output", str(out)])
    printed = capsys.readouterr().out
    assert "note: the heads of source_0, source_1 stay behind\n" in printed
    assert "acts+ of 2 adapters, output factors 1, -0.5, own streams" in printed and "encoder.layer.2.output" in printed
    assert printed.endswith(f"wrote {out}\n")
    record = json.loads((out / "merge.json").read_text())
    assert (record["weights"], record["recipe"]["scale"], record["recipe"]["ridge"]) == ([1.0, -0.5], "sum", 0.01)
    assert {site["reference"] for site in record["sites"].values()} == {"source_1"}
    assert record["recipe"]["reference"] == 1
    merge: dict[str, Any] = {"preset": "acts+", "weights": [1.0, -0.5], "scale": "sum", "tokens": 50}
    merge |= {"recipe": {"ridge": 0.01, "reference": "source_1"}}
    merge_adapters(family, tmp_path / "again", backbone=backbone, merge=merge, data=TEXTS, batch_size=4, max_length=16)
    assert same(out, tmp_path / "again")


def test_with_a_task(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = [*words, "--preset=acts", "--streams=shared", "--data=toy_sentiment", "--data_split=validation"]
    main([*command, "--output", str(out)])
    record = json.loads((out / "merge.json").read_text())
    assert (record["data"]["task"], record["data"]["split"], record["streams"]) == (
        "toy_sentiment",
        "validation",
        "shared",
    )
    assert "shared streams" in capsys.readouterr().out


def test_options_with_several_values_may_be_given_again() -> None:
    given = _parser().parse_args("--backbone b --output o --adapters A B --adapters C --set x=1 --set y=2".split())
    assert (given.adapters, given.set, given.weights) == (["A", "B", "C"], ["x=1", "y=2"], None)


def test_an_adapter_that_was_merged_knows_its_backbone_s_weights(
    words: list[str], backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, "--preset", "wts", "--output", str(tmp_path / "out")])
    model = AutoModel.from_pretrained(backbone)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    again = ["merge", "--adapters", str(tmp_path / "out"), "--preset", "sum", "--output", str(tmp_path / "two")]
    said = refused(*again, "--backbone", str(tmp_path / "other"), status=1, capsys=capsys)
    assert "a backbone of the same shape with other weights" in said
    main([*again, "--backbone", backbone])


def test_without_data(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*words, "--preset", "wts", "--scale", "0.5", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["outputs"] == [0.25, 0.25] and record["data"] is None
    assert "cosine" in printed and "output error" not in printed and "streams" not in printed


def test_lora(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(written(tmp_path / str(i), module(backbone, i, kind="lora"), "peft")) for i in range(2)]
    command = ["merge", "--adapters", *paths, "--backbone", backbone, "--preset", "svd", "--rank", "3"]
    main([*command, "--output", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert (record["adapter"]["bottleneck"], record["format"], record["recipe"]["rank"]) == (3, "peft", 3)
    assert "lost" in capsys.readouterr().out and (tmp_path / "out/adapter_model.safetensors").exists()


def test_help_names_presets_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["merge", "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    for word in ("acts+", "select", "svd", "--texts FILE", "--data_split", "examples:", "--streams"):
        assert word in printed
    for stage in fields(Recipe):
        assert f"{stage.name}=" in printed or stage.name == "scale"


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "no data": (
        [],
        2,
        "merge.preset = 'select': needs unlabelled data for activations; give data (--data TASK or --texts",
    ),
    "preset": (["--preset", "best"], 2, "merge.preset = 'best': must be one of sum, avg, wts, acts, acts+, select"),
    "stage": (["--preset", "wts", "--set", "solver"], 2, "set = 'solver': must be a stage and its value"),
    "twice": (["--set", "ridge=1", "ridge=2"], 2, "set = 'ridge=2': must be a stage and its value, each stage once"),
    "twice, apart": (["--set", "ridge=1", "--set", "ridge=2"], 2, "must be a stage and its value, each stage once"),
    "scale 0": (["--preset", "avg", "--scale", "0"], 2, "merge.scale = 0: must be sum, mean, or a factor"),
    "unknown stage": (["--set", "best=1"], 2, "merge.recipe.best: preset select has balance"),
    "quoted": (["--preset", "wts", "--set", 'reference="0"'], 2, "merge.recipe.reference = '0': must be first, medoid"),
    "value": (["--set", "ridge=high"], 2, "merge.ridge = 'high': must be of type float, and finite"),
    "scale": (["--preset", "avg", "--scale", "median"], 2, "merge.scale = 'median': must be mean, sum or a number"),
    "rank": (["--rank", "3"], 2, "merge.recipe.rank: preset select has"),
    "both": (["--data", "mrpc", "--texts", "t"], 2, "data = mrpc, texts = t: give one of them"),
    "split": (["--data", "mrpc", "--data_split", "dev"], 2, "data_split = 'dev': must be train, validation or test"),
    "root": (["--data", "mrpc", "--data_root", "nowhere"], 2, "data_root = nowhere: there is no such folder"),
    "task": (["--data", "nothing"], 2, "'nothing'"),
    "texts": (["--texts", "nowhere.txt"], 1, "nowhere.txt: cannot be read as text"),
    "format": (["--preset", "avg", "--format", "onnx"], 2, "format = 'onnx': must be one of adapterhub, peft"),
    "head": (["--preset", "avg", "--head", "nobody"], 2, "head = 'nobody': must be one of source_0, source_1"),
    "dtype": (["--preset", "avg", "--dtype", "fp8"], 2, "backbone.dtype = 'fp8': must be one of float32, bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_is_wrong(
    case: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, status, message = REFUSED[case]
    said = refused(*words, *more, "--output", str(tmp_path / "out"), status=status, capsys=capsys)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_an_empty_file_and_a_folder_in_use(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    said = refused(
        *words, "--texts", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "out"), status=1, capsys=capsys
    )
    assert "empty.txt: holds no text" in said
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("")
    said = refused(*words, "--preset", "avg", "--output", str(tmp_path / "used"), status=2, capsys=capsys)
    assert "exists already and is not empty" in said
    assert "the following arguments are required: --backbone" in refused(
        "merge", "--adapters", "x", "--output", "y", status=2, capsys=capsys
    )
