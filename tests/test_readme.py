"""What the documents promise: every command in them runs, and its output is what they show.

A command is either run here or named in ``ELSEWHERE`` with the reason and what covers it instead.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_lightning import load_pruned
from peft_lightning.backbones.build import BackboneConfig, build_backbone, build_masked_lm
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.cli.main import main
from peft_lightning.data.toy import toy_rows
from peft_lightning.tasks import kinds
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import TASKS, get_task

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
HUB = "--config configs/overlays/gpu_bf16.yaml"
SEVERAL = "--trainer.devices"

ELSEWHERE = {
    "make setup": "every target needs it; .ci/run starts from it",
    "make lint": ".ci/run runs it",
    "make test": "this is it",
    "make bench-mrpc": "takes up to 45 minutes; tests/benchmarks runs it with --tiny",
    "make bench-prune": "takes up to 90 minutes; tests/benchmarks runs it with --tiny",
    "make bench-mera TABLE=1": "takes hours; tests/benchmarks runs it with --tiny",
    "make bench-scaling": "takes minutes; tests/benchmarks runs it with --tiny",
    "sbatch configs/cluster/slurm.sh --config configs/fine_tune.yaml --run_dir runs/slurm": "needs SLURM; "
    "tests/test_cluster.py runs it with srun replaced",
    "NODES=2 DEVICES=8 HEAD=node0:29400 bash configs/cluster/torchrun.sh --config configs/fine_tune.yaml "
    "--run_dir runs/nodes": "needs two nodes; tests/test_nodes.py runs it over loopback",
    "make bench-study": "takes minutes; tests/benchmarks runs it with --tiny",
    "make bench-merge": "takes minutes; tests/benchmarks runs it with --tiny",
    "make bench-tasks": "takes an hour; tests/benchmarks runs it with --tiny",
    "make bench-speed": "takes minutes; tests/benchmarks runs it with --tiny",
    "make bench-pretrain": "takes minutes; tests/benchmarks runs it with --tiny",
    "peft-lightning fit --config configs/sctd_pretrain.yaml --config configs/overlays/pretrain_8gpu.yaml "
    "--data.inputs path/to/corpus": "needs eight GPUs; two steps of it run in tests/test_configs.py, on a CPU",
    f"peft-lightning fit --config configs/sparse_adapter.yaml {HUB}": "needs a hub and a GPU; two steps of it run in "
    "tests/test_configs.py, on a CPU and a toy",
}


def _blocks(path: Path, language: str) -> list[str]:
    """Return the code blocks of a Markdown file in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def _commands(path: Path) -> list[str]:
    joined = "\n".join(_blocks(path, "bash")).replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip() and line[0] != "#"]


def _demo() -> list[str]:
    """Return the commands that ``make demo`` runs once everything is set up."""
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [line.split("bin/", 1)[1] for line in lines if "bin/peft-lightning" in line]


def _run(command: str) -> None:
    """Run a ``peft-lightning`` command in this process; exit status 0 or nothing is good."""
    words = shlex.split(command)
    assert words[0] == "peft-lightning", f"{command}: no test knows how to run it"
    try:
        main(words[1:])
    except SystemExit as end:
        assert not end.code, command


@pytest.fixture
def workplace(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that looks like the repository to a command, and is left when the test ends."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_ends_as_the_readme_shows(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = _demo()
    assert [shlex.split(command)[1] for command in commands] == ["fit", "fit", "test", "fit", "fit", "merge", "study"]
    if given := os.environ.get("DEMO_OUTPUT"):  # of `make demo` itself, just before
        printed = Path(given).read_text(encoding="utf-8")
    else:
        for command in commands:
            _run(command)
        printed = capsys.readouterr().out
    shown = re.search(r"<!-- output: make demo -->\n```text\n(.*?)```", DOCUMENTS[0].read_text(), re.DOTALL)
    assert shown is not None
    expected, actual = _shape(shown.group(1)), _shape(printed)
    assert actual[-len(expected) :] == expected
    # Seconds differ between machines; a score may by a row or two, and the rest must be what is shown.
    printed = printed[printed.rindex(shown.group(1).splitlines()[0]) :]
    assert _scores(printed) == pytest.approx(_scores(shown.group(1)), abs=0.02)
    assert _counts(printed) == _counts(shown.group(1))
    rows = [line.split("│") for line in printed.splitlines() if "│ toy_sentiment" in line]
    new, merged = (float(row[5].split("±")[0]) for row in rows)
    assert merged > new + 5


def _scores(text: str) -> list[float]:
    """Return the scores of a run's table, each followed by that of the trivial answer."""
    return [
        float(number) for line in text.splitlines() if "most rows" in line for number in re.findall(r"\d\.\d+", line)
    ]


def _counts(text: str) -> list[str]:
    """Return the lines about parameters, without the padding that their column gives them."""
    return [" ".join(line.split()) for line in text.splitlines() if "parameters" in line or "kept" in line]


def _shape(text: str) -> list[str]:
    """Return the lines with numbers, rules and widths taken out: these differ from machine to machine."""
    lines = (re.sub(r"\d[\d.,]*", "#", re.sub(r"[─━┄═]+", "─", line)) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def _readme_commands() -> list[str]:
    """Return the ``peft-lightning`` commands of the README that are run here."""
    return [each for each in _commands(DOCUMENTS[0]) if each.startswith("peft-lightning") and each not in ELSEWHERE]


def test_commands_of_the_readme_with_several_devices_run(workplace: Path) -> None:
    """Processes that start more of their kind have to be fresh ones."""
    commands = [command for command in _readme_commands() if SEVERAL in command]
    assert commands
    for command in commands:
        words = [sys.executable, "-m", "peft_lightning", *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)  # a minute on a quiet machine, for some twenty commands
def test_commands_of_the_readme_run(workplace: Path) -> None:
    _write_reviews(workplace)
    _write_encoder_and_data(workplace / "path" / "to")
    _write_texts(workplace)
    _write_demo(workplace / "runs" / "demo")
    for command in _readme_commands():
        if SEVERAL not in command:
            _run(command)
    assert len((workplace / "runs" / "first" / "predictions.jsonl").read_text().splitlines()) > 0
    assert (workplace / "runs" / "reviews" / "report.json").is_file()
    assert (workplace / "probed" / "probe.png").is_file()
    assert json.loads((workplace / "runs" / "copy" / "report.json").read_text())["scores"]["rougeL"] > 0.95
    (block,) = (block for block in _blocks(DOCUMENTS[0], "python") if "runs/span" in block)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    (answer,) = names["found"]
    assert answer["answer"] in "the red dog sleeps is big is not good"
    peft = pytest.importorskip("peft")
    peft.PeftModel.from_pretrained(load_pruned("pruned_lora"), "pruned_lora")


def _write_encoder_and_data(folder: Path) -> None:
    """Write what the README calls path/to/encoder and path/to/data: a small random encoder, and a few rows of RTE."""
    backbone = build_backbone(BackboneConfig(config={"model_type": "bert", "hidden_size": 24}, tokenizer="toy"))
    backbone.save_pretrained(folder / "encoder")  # type: ignore[operator]
    toy_tokenizer().save_pretrained(folder / "encoder")
    (folder / "data" / "rte").mkdir(parents=True)
    rows = [{"sentence1": "the cat", "sentence2": "the dog", "label": i % 2} for i in range(16)]
    for split in ("train", "validation"):
        (folder / "data" / "rte" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_reviews(folder: Path) -> None:
    """Write the YAML that the README shows, and a few rows for it."""
    (folder / "my_reviews").mkdir()
    rows = "review,label\n" + "".join(f"it was a {word} film,{word}\n" for word in ["bad", "good"] * 8)
    for split in ("train", "validation"):
        (folder / "my_reviews" / f"{split}.csv").write_text(rows)
    (block,) = (block for block in _blocks(DOCUMENTS[0], "yaml") if "name: reviews" in block)
    (folder / "reviews.yaml").write_text(block)


def _write_demo(folder: Path) -> None:
    """Write what ``make demo`` leaves and the README goes on from, in little, and the YAML with a prompt."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["true", "false"])
    config = {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model: Any = build_masked_lm(BackboneConfig(config=config, tokenizer="toy"), tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "pretrain" / "model")
    for command in _demo():
        if "--data.task" in command:
            _run(f"{command} --trainer.max_epochs 1")
    (block,) = (block for block in _blocks(DOCUMENTS[0], "yaml") if "kind: prompt" in block)
    Path("prompt.yaml").write_text(block)


def _write_texts(folder: Path) -> None:
    """Write what the README calls my_texts, a few hundred documents, and sentences.tsv."""
    (folder / "my_texts").mkdir()
    rows = toy_rows("toy_sentiment", "train")
    (folder / "my_texts" / "some.txt").write_text("\n\n".join(row["text"] for row in rows) * 4)
    splits = ["tr"] * 60 + ["va"] * 20 + ["te"] * 20
    lines = [f"{split}\t{row['label']}\t{row['text']}\n" for split, row in zip(splits, rows, strict=False)]
    (folder / "sentences.tsv").write_text("".join(lines))


def test_python_of_the_readme_runs(workplace: Path) -> None:
    blocks = [block for block in _blocks(DOCUMENTS[0], "python") if "runs/span" not in block]
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
        (answer,) = names["answers"]
        assert set(answer) == {"label", "probabilities"}
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
    assert load_pruned("pruned_in_python").config.num_labels == 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_run_or_named(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in _commands(path):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
            assert command in ELSEWHERE or command == "make demo", f"{command} is neither run nor named"
        else:
            assert words[0] == "peft-lightning" or command in ELSEWHERE, f"{command} is neither run nor named"


def test_what_commands_write_is_ignored() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    for words in map(shlex.split, _commands(DOCUMENTS[0])):
        for flag, folder in zip(words, words[1:], strict=False):
            if flag in ("--out", "--output", "--run_dir"):
                first = folder.split("/")[0]
                assert {f"{first}/", f"/{first}/"} & set(ignored), folder


def test_nothing_is_named_that_is_not_there() -> None:
    written = {command for path in DOCUMENTS for command in _commands(path)}
    assert set(ELSEWHERE) <= written


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = path if not file else path.parent / file
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path.name} links to {target}; there are {sorted(slugs)}"


def test_the_readme_names_every_kind_and_task() -> None:
    text = DOCUMENTS[0].read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\(peft_lightning/tasks/kinds/\1.py\) \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    shown = {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows}
    known: dict[str, set[str]] = {info.name: set() for info in pkgutil.iter_modules(kinds.__path__)}
    for task in TASKS.values():
        if not task.name.startswith("toy_"):
            known[task.kind].add(task.name)
    del known["base"]
    assert {kind: shown.get(kind) for kind in known} == known
    toys = {name for name in TASKS if name.startswith("toy_")}
    assert toys == set(
        re.findall(r"`(toy_\w+)`", text.partition("The other tasks that need no files")[2].partition("\n\n")[0])
    )


def test_the_tasks_of_the_readme_are_tasks() -> None:
    (block,) = (block for block in _blocks(DOCUMENTS[0], "yaml") if "kind: span" in block)
    built = [build_kind(get_task(part["task"])) for part in yaml.safe_load_all(block)]
    assert all(kind.metrics() for kind in built)
    shown = {kind.task.kind for kind in built}
    assert shown == {"span", "tags", "choice", "multilabel", "generate", "grouped", "marked"}


def test_the_metrics_of_every_kind_are_named() -> None:
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\([^)]*\) \|[^|]*\|([^|]*)\|", DOCUMENTS[0].read_text(), re.MULTILINE))
    for task in TASKS.values():
        named = rows[task.kind] + (rows["classify"] if "those of `classify`" in rows[task.kind] else "")
        assert set(task.metrics) <= set(re.findall(r"`(\w+)`", named)), task.name
