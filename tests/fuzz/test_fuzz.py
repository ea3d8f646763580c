"""Broken files: each is read as what was written, or refused in one line; soon, and in little memory."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.formats import FORMATS, READERS
from tests.fuzz.worker import BYTES, SECONDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peft_lightning"
# Calls that open a file, or make something of what is in one.
OPENING = {"open", "json.loads", "json.load", "parse_json", "read_text", "read_bytes", "read_json", "read_tensors"}
OPENING |= {"read_safetensors", "read_pickled", "check_pickled", "load_safetensors", "safe_open", "torch.load"}
OPENING |= {"from_pretrained", "load_dataset", "memory_map", "open_file", "ParquetFile", "read_table", "read_csv"}
OPENING |= {"read_yaml", "check_yaml", "safe_load", "yaml.load", "yaml.parse", "get_loader", "ZipFile", "genops"}


def broken(folder: Path, count: int, seed: int, names: list[str], seconds: int) -> list[dict[str, Any]]:
    """Let another process break and read files; each result is there even if it is killed."""
    words = [sys.executable, "-m", "tests.fuzz.worker", str(folder), str(count), str(seed), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PEFT_LIGHTNING_CACHE": str(folder / "cache")}
    output, errors = folder / "output", folder / "errors"
    with output.open("w") as out, errors.open("w") as err:
        try:
            code = subprocess.run(words, cwd=ROOT, env=environment, stdout=out, stderr=err, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = -1
    found = [json.loads(line) for line in output.read_text().splitlines() if line.startswith('{"format"')]
    last = found[-1:] and (found[-1]["format"], found[-1]["number"])
    assert code == 0, f"ended with {code} after {last}: {errors.read_text()[-2000:]}"
    return found


def check(found: list[dict[str, Any]], least: int) -> None:
    assert len(found) >= least
    bad = [entry for entry in found if entry["outcome"] not in ("read", "refused")]
    assert not bad, "\n".join(
        f"{e['format']} {e['number']} ({e['how']}): {e['outcome']} {e.get('text', '')}" for e in bad
    )
    assert max(entry["seconds"] for entry in found) < SECONDS
    assert max(entry["bytes"] for entry in found) < BYTES
    for name in {entry["format"] for entry in found}:
        outcomes = Counter(entry["outcome"] for entry in found if entry["format"] == name)
        # Otherwise the example or the breaking would be no good.
        kinds = {"ours": {"refused"}, "rebuilt": {"read"}}.get(FORMATS[name].trust, {"read", "refused"})
        assert len(found) < 1000 or {*outcomes} >= kinds, f"{name}: {outcomes}"


@pytest.mark.timeout(700)
@pytest.mark.xdist_group("fuzz")
def test_two_hundred_broken_files(tmp_path: Path) -> None:
    check(broken(tmp_path, 6, 0, list(FORMATS), 600), 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_broken_files(tmp_path: Path) -> None:
    check(broken(tmp_path, 56, 1, list(FORMATS), 3500), 2000)


def test_no_reader_is_missing() -> None:
    """A module of the package that opens files is in the list, and what the list names is there."""
    opening = set()
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if any({ast.unparse(call), ast.unparse(call).rpartition(".")[2]} & OPENING for call in calls):
            opening.add(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    assert opening - READERS.keys() == set(), "these open files; name the formats that break them, or say why none does"
    assert {name for name in READERS if not (PACKAGE / f"{name.replace('.', '/')}.py").is_file()} == set()
    named = {name for reason in READERS.values() if isinstance(reason, tuple) for name in reason}
    assert named <= FORMATS.keys()
