"""Wrong options and damaged files end in one clear line and an exit status, and lose nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_lightning.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FIT = [
    "fit",
    "--config", str(ROOT / "configs/sparse_adapter.yaml"),
    "--config", str(ROOT / "configs/overlays/toy.yaml"),
    "--config", str(ROOT / "configs/overlays/cpu.yaml"),
    "--trainer.max_epochs", "-1", "--trainer.max_steps", "3", "--data.init_args.batch_size", "8",
    "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peft-lightning"])


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run, expect a failure, and return its status and its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("peft-lightning: error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return int(caught.value.code or 0), lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    main([*FIT, "--run_dir", str(folder), "--trainer.enable_progress_bar", "false"])
    return folder


USAGE: dict[str, tuple[list[str], str]] = {
    "unknown task": (["--data.init_args.task", "mrpcc"], r"mrpcc.*mrpc"),
    "two precisions": (
        ["--trainer.precision", "bf16-mixed", "--trainer.plugins", "lightning.pytorch.plugins.DoublePrecision"],
        r"trainer: Received both .precision",
    ),
    "missing root": (["--data.init_args.task", "mrpc", "--data.init_args.root", "/no/such"], "/no/such"),
    "sparsity": (["--model.init_args.prune.sparsity", "1.0"], r"sparsity = 1\.0: must be the share removed"),
    "negative sparsity": (["--model.init_args.prune.sparsity", "-0.1"], r"sparsity = -0\.1"),
    "bottleneck": (["--model.init_args.adapter.bottleneck", "0"], "bottleneck = 0: must be at least 1"),
    "score": (["--model.init_args.prune.score", "best"], "must be random, magnitude, er, snip, grasp, given"),
    "target": (
        ["--model.init_args.adapter.target", "decoder"],
        "matches no site; there are: encoder.layer.0",
    ),
    "backbone": (
        ["--model.init_args.backbone", '{"name": "/no/such/model", "config": null, "tokenizer": "toy"}'],
        r"backbone\.name = '/no/such/model': cannot be built",
    ),
    "two backbones": (
        ["--model.init_args.backbone.name", "/no/such/model"],
        r"error: backbone: give either name .* or config .*; null for the one that a configuration names",
    ),
    "tokenizer": (
        ["--model.init_args.backbone.tokenizer", "/no/such/tokenizer"],
        r"'/no/such/tokenizer': its tokenizer cannot be loaded, there is no such folder",
    ),
    "tokenizer too large": (
        ["--model.init_args.backbone.config.vocab_size", "8"],
        r"has 40 words, the backbone embeds 8",
    ),
    "head": (["--model.init_args.head", "round"], "round.*dense"),
    "batch size": (["--data.init_args.batch_size", "0"], "batch_size is 0"),
    "learning rate": (["--model.init_args.optim.lr", "0"], r"optim\.lr = 0\.0: must be above 0"),
    "misspelt option": (["--model.init_args.prune.sparsiti", "0.5"], "sparsiti"),
    "unknown method": (["--model.class_path", "SparseAdaptorModule"], "SparseAdaptorModule"),
    "another class": (["--model.class_path", "os.system"], r"os\.system"),
    "class weights": (["--model.init_args.class_weights", "[1,2,3]"], "must be 2 numbers"),
    "resume": (["--resume", "always"], "--resume = 'always': must be 'auto' or 'changed'"),
    "not a number for the trainer": (
        ["--trainer.max_epochs", "x"],
        r"trainer\.max_epochs.*must be int or null, not x$",
    ),
    "no devices": (["--trainer.devices", "0"], r"devices = 0: must be auto, -1 for all, a number from 1, or"),
    "fewer devices": (["--trainer.devices=-2"], r"devices = -2: must be auto"),
    "a misspelt strategy": (["--trainer.strategy", "ddb"], r"strategy = ddb: must be auto, ddp or fsdp2$"),
    "another strategy": (["--trainer.strategy", "deepspeed"], r"strategy = deepspeed: must be auto, ddp or fsdp2$"),
    "accumulation": (["--trainer.accumulate_grad_batches", "0"], r"accumulate_grad_batches = 0: must be at least 1"),
    "saving": (["--save_every_n_steps", "0"], "--save_every_n_steps = 0: must be at least 1"),
    "default root": (["--trainer.default_root_dir", "x"], "chosen by --run_dir"),
    "negative seed": (["--seed_everything", "-5"], "seed_everything = -5"),
    "drawn seed": (["--seed_everything", "true"], "seed_everything = True: must be a number"),
    "a large seed": (["--seed_everything", "4294967296"], "seed_everything = 4294967296: must be a number, .* below"),
    "devices in words": (["--trainer.devices", "two"], "devices = two: must be auto, -1 for all"),
    "an accelerator that is not here": (["--trainer.accelerator", "tpu"], "error: trainer: .*not met"),
    "half of an option": (["--trainer.max_epoch", "1"], "trainer.max_epoch"),
    "half of another": (["--confi", "x.yaml"], "--confi"),
    "no end": (["--trainer.max_steps", "-1"], "give trainer.max_steps"),
    "an option that follows": (["--model.init_args.seed", "3"], "--model.seed: follows --seed_everything"),
    "a task in the wrong place": (["--model.task", "mrpc"], "--model.task: follows --data.task"),
}


TYPES = {
    "--model.prune.target 0.8": r"prune\.target.*must be dict\[str, float\] or null, not 0\.8$",
    "--model.prune.heads_to_prune true": r"prune\.heads_to_prune.*must be int or float or null, not true",
    "--model.lora.high_blocks x": r"lora\.high_blocks.*must be int or null, not x$",
    "--model.backbone.config null": r"option \"config\": takes null only from a configuration file",
    "--trainer.deterministic maybe": r"trainer\.deterministic\": must be true or false or 'warn' or null, not maybe$",
    "--zero_shot perhaps": r"zero_shot\": must be true or false, not perhaps$",
    "--data.batch_size x": r"batch_size\": must be int, not x$",
}


@pytest.mark.parametrize("option", TYPES)
def test_a_wrong_type_is_said_with_the_right_one(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(ROOT / "configs/prune_lora.yaml") if "sparse_adapter" in word else word for word in FIT]
    status, line = fails([*words, "--run_dir", str(tmp_path / "run"), *option.split()], capsys)
    assert status == 2 and re.search(TYPES[option], line), line


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra, message = USAGE[case]
    status, line = fails([*FIT, "--run_dir", str(tmp_path / "run"), *extra], capsys)
    assert status == 2, line
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, line = fails(["fitt"], capsys)
    assert status == 2 and "'fitt' is not a command; there are: fit" in line


def task_folder(tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "mine", "text": ["text"], "labels": ["no", "yes"], "splits": {"test": "validation"}}
    config = tmp_path / "task.yaml"
    config.write_text(yaml.safe_dump({"data": {"init_args": {"task": task, "root": str(tmp_path / "data")}}}))
    return [*FIT, "--config", str(config), "--run_dir", str(tmp_path / "run")]


GOOD = [{"text": "the cat is good", "label": i % 2} for i in range(12)]
DATA: dict[str, tuple[list[dict[str, Any]], str]] = {
    "column": ([{"sentence": "x", "label": 0}], r"no column 'text'; there are: "),
    "empty": ([], "no rows"),
    "label": ([*GOOD, {"text": "x", "label": 7}], r"row 12.*7"),
    "text": ([*GOOD, {"text": None, "label": 1}], r"row 12.*not a text"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, message = DATA[case]
    status, line = fails(task_folder(tmp_path, rows), capsys)
    assert status == 1, line

    assert re.search(message, line), line
    assert "train.jsonl" in line


def test_missing_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = task_folder(tmp_path, GOOD)
    (tmp_path / "data" / "validation.jsonl").unlink()
    status, line = fails(words, capsys)
    assert status == 1 and "validation" in line and "train" in line


def test_a_task_in_yaml_alone_trains(tmp_path: Path) -> None:
    main(task_folder(tmp_path, GOOD))
    assert (tmp_path / "run" / "report.json").exists()


def test_an_existing_run_is_refused_and_untouched(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    status, line = fails([*FIT, "--run_dir", str(finished)], capsys)
    assert status == 2 and "exists already; add --resume auto" in line
    assert {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()} == before


def test_resuming_with_other_settings_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FIT, "--run_dir", str(finished), "--resume", "auto", "--model.init_args.optim.lr", "0.25"]
    status, line = fails(words, capsys)
    assert status == 2
    assert "model.init_args.optim.lr: 0.005 before, 0.25 now" in line


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_damaged_checkpoint(command: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes((finished / "last.ckpt").read_bytes()[:-500])
    status, line = fails([command, "--ckpt_path", str(path)], capsys)
    assert status == 1 and "cut.ckpt: damaged, truncated or not a checkpoint" in line
    status, line = fails([command, "--ckpt_path", str(tmp_path / "absent.ckpt")], capsys)
    assert status == 1 and "there is no such checkpoint" in line
    status, line = fails([command], capsys)
    assert status == 2


def test_a_checkpoint_on_another_backbone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--ckpt_path", str(finished / "last.ckpt")]
    wider = [
        "--model.init_args.backbone.config",
        '{"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4}',
    ]
    status, line = fails([*words, *wider], capsys)
    assert status == 1 and "belongs to another backbone" in line and "hidden_size 64 here 32" in line


def test_a_flag_beside_a_checkpoint_is_honoured_or_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["test", "--ckpt_path", str(finished / "last.ckpt"), "--run_dir"]
    main([*words, str(tmp_path / "a")])
    main([*words, str(tmp_path / "b"), "--model.init_args.backbone.dtype", "bfloat16"])
    scores = [json.loads((tmp_path / part / "test.json").read_text())["scores"] for part in "ab"]
    assert scores[0]["loss"] != scores[1]["loss"]  # honoured
    status, line = fails([*words, str(tmp_path / "c"), "--model.init_args.head", "linear"], capsys)
    assert status == 1 and "tensors do not fit this module; unexpected" in line  # refused


def test_a_runs_folder_and_an_adapters_are_measured_like_their_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for number, path in enumerate((run / "last.ckpt", run / "adapter", run)):
        if path == run:
            shutil.copy(run / "last.ckpt", run / "best.ckpt")
        main(["test", "--ckpt_path", str(path), "--run_dir", str(tmp_path / str(number))])
    scores = [json.loads((tmp_path / str(number) / "test.json").read_text())["scores"] for number in range(3)]
    assert scores[0] == scores[1] == scores[2]
    status, line = fails(["test", "--ckpt_path", str(run / "adapter"), "--model.adapter.kind", "lora"], capsys)
    assert status == 2 and "adapter.kind = lora, in the checkpoint houlsby: the checkpoint decides this" in line
    status, line = fails([*FIT, "--run_dir", str(tmp_path / "new"), "--ckpt_path", str(run / "adapter")], capsys)
    assert status == 2 and "must be a .ckpt file" in line


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_nothing_is_measured_without_a_checkpoint(
    command: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(finished / "config.yaml")]
    status, line = fails([command, *config], capsys)
    assert status == 2 and f"{command}: give --ckpt_path" in line
    status, line = fails([command, *config, "--run_dir", str(tmp_path)], capsys)
    assert status == 2 and f"{command}: give --ckpt_path" in line


def test_the_flag_wins_over_a_configuration_without_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    words = ["test", "--ckpt_path", str(finished / "last.ckpt")]
    main([*words, "--run_dir", str(tmp_path / "a")])
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text("ckpt_path: null\n")
    config = ["--config", str(finished / "config.yaml"), "--config", str(nothing)]
    main([*words, *config, "--run_dir", str(tmp_path / "b")])
    reports = [json.loads((tmp_path / part / "test.json").read_text()) for part in "ab"]
    assert reports[0]["scores"] == reports[1]["scores"]
    assert reports[1]["kept_share"] == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize(
    ("flag", "value", "recorded"),
    [("optim.lr", "1e-7", "0.005"), ("prune.sparsity", "0.8", "None"), ("adapter.scaling", "0.5", "None")],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_what_a_checkpoint_decides_is_refused_as_a_flag(
    command: str, flag: str, value: str, recorded: str,
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [*(FIT if command == "fit" else [command]), "--run_dir", str(tmp_path / "new")]
    words += ["--ckpt_path", str(finished / "last.ckpt"), f"--model.init_args.{flag}", value]
    status, line = fails(words, capsys)
    assert status == 2
    assert f"{flag} = {float(value)}, in the checkpoint {recorded}: the checkpoint decides this" in line


def test_a_checkpoint_does_not_choose_what_is_imported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    import torch

    good = torch.load(finished / "last.ckpt", weights_only=True)
    for place in ("class", "kind", "data"):
        content = dict(good)
        manifest = json.loads(json.dumps(good["peft_lightning"]))
        if place == "class":
            manifest["class"] = "this.X"
        elif place == "kind":
            manifest["hyper_parameters"]["task"]["kind"] = "this.X"
        else:
            manifest["run_config"]["data"]["class_path"] = "this.X"
        content["peft_lightning"] = manifest
        torch.save(content, tmp_path / "evil.ckpt")
        status, line = fails(["test", "--ckpt_path", str(tmp_path / "evil.ckpt")], capsys)
        assert status == 1 and "this.X" in line, place
        assert "this" not in sys.modules


def test_the_effective_configuration_can_be_used_again_after_a_resume(finished: Path, tmp_path: Path) -> None:
    report = (finished / "report.json").read_text()
    config = ["--config", str(finished / "config.yaml")]
    main(["fit", *config, "--resume", "auto"])  # a finished run: nothing left to do
    kept, now = (json.loads(text) for text in (report, (finished / "report.json").read_text()))
    assert {k: v for k, v in now.items() if k != "seconds"} == {k: v for k, v in kept.items() if k != "seconds"}
    assert now["scores"]
    main(["fit", *config, "--run_dir", str(tmp_path / "new")])
    assert (tmp_path / "new" / "report.json").exists()


def test_a_trial_run_leaves_nothing(tmp_path: Path) -> None:
    main([*FIT, "--run_dir", str(tmp_path / "run"), "--trainer.fast_dev_run", "true"])
    assert not (tmp_path / "run").exists()


def test_validate_counts_its_own_seconds(finished: Path, tmp_path: Path) -> None:
    main(["validate", "--ckpt_path", str(finished / "last.ckpt"), "--run_dir", str(tmp_path)])
    assert json.loads((tmp_path / "validate.json").read_text())["seconds"] < 60


def test_a_failed_start_does_not_take_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FIT, "--run_dir", str(tmp_path / "run")]
    fails([*words, "--data.init_args.task", "mrpc", "--data.init_args.root", "/no/such"], capsys)
    main(words)


def test_predict_says_where_the_answers_are(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", "--ckpt_path", str(finished / "last.ckpt"), "--run_dir", str(tmp_path)])
    assert "256 answers in" in capsys.readouterr().out


def test_a_full_disk_keeps_the_previous_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    folder = tmp_path / "run"
    real, calls = torch.save, [0]

    def full(content: Any, file: Any, *args: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] > 3:  # the first step writes last.ckpt, best.ckpt and last.ckpt
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(content, file, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    words = [*FIT, "--run_dir", str(folder), "--save_every_n_steps", "1"]
    status, line = fails(words, capsys)
    monkeypatch.undo()
    assert status == 1
    assert "cannot save the checkpoint" in line and "No space left" in line and "previous one is unchanged" in line
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 1
    main([*words, "--resume", "auto"])
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    shutil.rmtree(folder)


def test_debug_gives_the_traceback() -> None:
    from peft_lightning.errors import UsageError

    with pytest.raises(UsageError):
        main([*FIT, "--run_dir", "x", "--resume", "always", "--debug"])
