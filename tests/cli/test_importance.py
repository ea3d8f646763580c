"""``importance`` from the command line: what it writes, that it prunes, what it says, and how it refuses."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from peft_lightning import PruneLoRAModule, TaskDataModule
from peft_lightning.cli.main import main
from tests.analysis.test_encoder import folder
from tests.analysis.test_heatmap import CROSS, points
from tests.cli.test_tools import refused

SIZES = ["--batches", "2", "--batch_size", "8", "--max_length", "16"]


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """A folder with 3 blocks of 4 heads, large enough that the heads differ."""
    return folder(tmp_path / "one", num_attention_heads=4, initializer_range=0.3)


@pytest.fixture
def words(backbone: str) -> list[str]:
    """A command that works, but for ``--out``."""
    return ["importance", "--backbone", backbone, "--task", "toy_sentiment", *SIZES]


def module(backbone: str, task: str = "toy_sentiment", **options: Any) -> PruneLoRAModule:
    return PruneLoRAModule(task=task, backbone=backbone, max_length=16, **options)


def measured(backbone: str, task: str, seed: int, **options: Any) -> Any:
    """What the module itself measures, on the same rows."""
    source = TaskDataModule(task=task, tokenizer=backbone, batch_size=8, max_length=16, seed=seed)
    source.setup("fit")
    one = module(backbone, task, seed=seed, **options)
    one.configure_model()
    return one.measure(list(islice(source.train_dataloader(), 2)))


def flat(heads: dict[str, list[float]]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in heads.values()])


def test_it_measures_writes_and_prunes(
    words: list[str], backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([*words, "--task", "toy_sentiment,toy_pairs", "--seeds", "1,2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.endswith(f"wrote {out}\n")
    for word in ("importance of blocks (normalised)", "toy_pairs, 32 examples", "toy_sentiment and toy_pairs: rank"):
        assert word in printed
    names = {"toy_sentiment.json", "toy_pairs.json", "report.json", "heads.png"}
    assert {path.name for path in out.iterdir()} == names
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    for task in ("toy_sentiment", "toy_pairs"):
        content = json.loads((out / f"{task}.json").read_text())
        ones = [measured(backbone, task, seed) for seed in (1, 2)]
        assert (content["task"], content["seeds"], content["batches"], content["norm"]) == (task, [1, 2], 2, "layer")
        assert content["examples"] == 32 and content["tokens"] == ones[0].tokens + ones[1].tokens
        assert len(content["heads"]) == 3 and not content["neurons"] and not content["blocks"]
        for path, values in content["heads"].items():
            mean = np.mean([one.heads[path].numpy() for one in ones], 0)
            assert len(values) == 4 and values == pytest.approx(mean.tolist(), rel=1e-9)
        one, two = (flat(heads) for heads in report["tasks"][task]["by_seed"].values())
        between = report["tasks"][task]["between_seeds"]
        assert abs(one - two).max() > 1e-3  # another classifier, other rows
        assert between["mean"] == between["least"] == pytest.approx(spearmanr(one, two).statistic, abs=1e-9)
        assert f"{task}: rank correlation between seeds {between['mean']:.2f} (one pair): " in printed
        pruned = module(backbone, task, importance={"file": str(out / f"{task}.json")}, prune={"heads_to_prune": 3})
        pruned.configure_model()  # no trainer and no data: the file decides
        assert pruned.plan is not None and pruned.measured is not None and pruned.measured.examples == 32
        gone = {(path, head) for path, kept in pruned.plan.heads.items() for head in range(4) if head not in kept}
        assert gone == {(row["attention"], row["head"]) for row in report["tasks"][task]["table"][:3]}
    assert report["verdicts"] and all(line in printed for line in report["verdicts"])
    with Image.open(out / "heads.png") as picture:
        assert picture.width > 500


def test_neurons_gates_and_a_trained_classifier(words: list[str], backbone: str, tmp_path: Path) -> None:
    more = ["--neurons", "--blocks", "gate", "--norm", "all", "--classifier_steps", "3", "--lr", "0.01"]
    main([*words, *more, "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "toy_sentiment.json").read_text())
    assert [len(values) for values in content["neurons"].values()] == [32, 32, 32] and len(content["blocks"]) == 3
    assert (content["classifier_steps"], content["lr"], content["seeds"]) == (3, 0.01, [42])
    settings = {"norm": "all", "blocks": "gate", "batches": 2, "classifier_steps": 3}
    options: dict[str, Any] = {"optim": {"lr": 0.01}, "prune": {"ffn_to_prune": 0.5}}
    one = measured(backbone, "toy_sentiment", 42, importance=settings, **options)
    untrained = measured(backbone, "toy_sentiment", 42, importance={**settings, "classifier_steps": 0}, **options)
    for kind in ("heads", "neurons"):
        for path, values in content[kind].items():
            assert values == pytest.approx(getattr(one, kind)[path].tolist(), rel=1e-9)
            assert values != pytest.approx(getattr(untrained, kind)[path].tolist(), rel=1e-3)
    assert content["blocks"] == pytest.approx(dict(one.blocks))
    file = {"file": str(tmp_path / "out" / "toy_sentiment.json"), "blocks": "gate", "norm": "all"}
    pruned = module(backbone, importance=file, prune={"ffn_to_prune": 0.5})
    pruned.configure_model()
    assert pruned.plan is not None and sum(map(len, pruned.plan.neurons.values())) == 48


def test_one_seed_says_so(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*words, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "toy_sentiment: rank correlation between seeds not measured: one seed" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tasks"]["toy_sentiment"]["between_seeds"] is None and report["between_tasks"] == []


def test_an_encoder_decoder_has_a_row_for_each_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder(tmp_path / "bart", "bart", init_std=0.3, decoder_attention_heads=4)
    words = ["importance", "--backbone", name, "--task", "toy_sentiment", *SIZES, "--out", str(tmp_path / "out")]
    main(words)
    printed = capsys.readouterr().out
    assert "encoder 3" in printed and "decoder 2" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    sizes = [len(values) for values in report["tasks"]["toy_sentiment"]["heads"].values()]
    assert sizes == [2, 2, 2, 4, 4, 4, 4] and (tmp_path / "out" / "heads.png").exists()


def test_a_fit_draws_what_went(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 12}
    config |= {"intermediate_size": 16, "initializer_range": 0.3}
    fit = [
        *("fit", "--model", "PruneLoRAModule", "--data", "TaskDataModule", "--data.init_args.task", "toy_sentiment"),
        *("--model.init_args.backbone", json.dumps({"config": config, "tokenizer": "toy"})),
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"),
        *(
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.logger",
            "false",
            "--model.init_args.importance.batches=1",
        ),
    ]
    crosses = []
    for heads in ("12", "3"):
        run = tmp_path / heads
        main([*fit, "--run_dir", str(run), "--model.init_args.prune.heads_to_prune", heads])
        crosses.append(len(points(run / "heads.png", CROSS)))
    assert crosses[1] > 0 and crosses[0] / crosses[1] == pytest.approx(4, rel=0.2)


def test_an_empty_file_and_null_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 12}
    fit = [
        *("fit", "--model", "PruneLoRAModule", "--data", "TaskDataModule", "--data.init_args.task", "toy_sentiment"),
        *("--model.init_args.backbone", json.dumps({"config": config, "tokenizer": "toy"})),
        *("--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true", "--run_dir", str(tmp_path / "run")),
    ]
    message = "importance.file = '': must be a file of peft-lightning importance, its folder, or null"
    assert message in refused(*fit, "--model.importance.file", "", status=2, capsys=capsys)
    main([*fit, "--model.importance.file", "null"])


def test_nothing_is_written_where_something_is(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "is not empty" in refused(*words, "--out", str(tmp_path / "out"), status=2, capsys=capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "ghost"], "task is 'ghost'; allowed: "),
        (["--task", ""], "task is ''; allowed: "),
        (["--task", "rte,mrpc,rte"], "task = 'rte,mrpc,rte': must name each task once"),
        (["--batches", "0"], "batches = 0: must be at least 1"),
        (["--classifier_steps", "-1"], "classifier_steps = -1: must be at least 0"),
        (["--lr", "0"], "lr = 0.0: must be above 0"),
        (["--lr", "nan"], "lr = nan: must be of type float, and finite"),
        (["--norm", "l1"], "norm = 'l1': must be one of layer, all"),
        (["--blocks", "best"], "blocks = 'best': must be one of normalised, raw, gate"),
        (["--seeds", "1,2,01"], "seeds = '1,2,01': must be whole numbers from 0 to"),
        (["--seeds", "-1"], "seeds"),
        (["--seeds", "one"], "seeds = 'one'"),
        (["--batch_size", "0"], "batch_size is 0; allowed: at least 1"),
        (["--max_length", "99"], "max_length = 99: the backbone has 40 positions"),
        (["--data", "/ghost"], "data = /ghost: there is no such folder"),
        (["--tokenizer", "/ghost"], "its tokenizer cannot be loaded, there is no such folder"),
        (["--backbone", "/ghost/model"], "/ghost/model"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_refusals(
    more: list[str], message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(*words, "--out", str(tmp_path / "out"), *more, status=2, capsys=capsys)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "options", "status", "message"),
    [
        ("gpt2", {"n_inner": 32}, 2, "its query, key and value are one fused map"),
        ("bert", {"vocab_size": 20}, 2, "words, the backbone embeds 20"),
        # of a lone head, the norm over its layer leaves 1
        ("bert", {"num_attention_heads": 1, "initializer_range": 0.3}, 1, "units have the same"),
    ],
)
def test_backbones_that_do_not_fit(
    kind: str,
    options: dict[str, Any],
    status: int,
    message: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = folder(tmp_path / "other", kind, **options)
    capsys.readouterr()  # what transformers says while it writes
    assert message in refused(*words, "--backbone", other, "--out", str(tmp_path / "out"), status=status, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    options = ["--task", "toy_sentiment,mrpc", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    said = refused(*words, *options, status=2, capsys=capsys)
    assert str(tmp_path / "data") in said and not (tmp_path / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["importance", "--help"])
    assert caught.value.code == 0 and "--classifier_steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "  importance  measure" in capsys.readouterr().out
    assert "required: --backbone, --task, --out" in refused("importance", status=2, capsys=capsys)
