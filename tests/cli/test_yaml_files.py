"""A small YAML file cannot fill the memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peft_lightning.cli.yaml_files import read_yaml
from peft_lightning.errors import UsageError
from tests.cli.test_bad_input import FIT, fails

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
BAD = {
    "laughs": (LAUGHS, "would be more than 100,000 values"),
    "deep": ("[" * 5000, "more than 60 deep"),
    "in itself": ("a: &a [*a]", "a collection holds itself"),
    "a number": (f"a: {'1' * 100_000}", "has a number of 100,000 characters"),
    "sixties": ("a: " + "1:" * 5000 + "1", "has a number of 10,001 characters"),
    "tagged": ('a: !!int "' + "1:" * 5000 + '1"', "has a number of 10,001 characters"),
    "bytes": ("a: \xff", "is not UTF-8"),
    "a class": ("a: !!python/object/apply:os.system [ls]", "is no YAML"),
    "a date": ("a: 2001-99-99", "is no YAML"),
    "braces": ("a: {b", "is no YAML"),
    "an unknown name": ("a: *b", "is no YAML|collection"),
    "a key twice": ("a: 1\nb: {c: [1], d: {c: 2}, c: 3}\n", "the key 'c' comes twice in a mapping, again in line 2"),
    "a key, then with a dot": ("a: {b: 1}\na.b: 2\n", "the key 'a' comes twice in a mapping, again in line 2"),
    "a key with a dot, then without": (
        "c:\n  a.b.d: 1\n  a.b: {e: 2}\n",
        "the key 'a.b' comes twice .*, again in line 3",
    ),
    "a key with a dot, then a word": ("a.b: 1\na: c\n", "the key 'a' comes twice"),
    "a name beside a dot": ("x: &x {b: 1}\na: *x\na.b: 2\n", "the key 'a' comes twice"),
    "a key that is a list": ("{[1]: 2}", "is no YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_and_soon(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    (tmp_path / "x.yaml").write_bytes(text.encode("latin-1"))
    begun = time.monotonic()
    with pytest.raises(UsageError, match=f"config = .*x.yaml: .*({message})"):
        read_yaml(tmp_path / "x.yaml")
    assert time.monotonic() - begun < 10


def test_dots_are_no_matter_beside_plain_values(tmp_path: Path) -> None:
    text = "{columns: {answers: a, answers.text: b}, a.b: {c: 1}, a.d: {c: 2}, ab: {c: 3}, x..: 1, ..: 2}"
    (tmp_path / "x.yaml").write_text(text)
    assert len(read_yaml(tmp_path / "x.yaml")) == 6


def test_a_large_file_a_folder_and_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, not a file"):
        read_yaml(tmp_path)
    with pytest.raises(UsageError, match="there is no such file"):
        read_yaml(tmp_path / "x.yaml")
    with (tmp_path / "x.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="has 1,099,511,627,776 bytes; allowed: 4,194,304"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["{}", '"{}"', "'{}'", '!!str "{}"', "|\n  {}"])
def test_a_long_text_is_no_number(text: str, tmp_path: Path) -> None:
    words = "a word and another " * 200
    (tmp_path / "x.yaml").write_text("a: " + text.format(words))
    assert read_yaml(tmp_path / "x.yaml")["a"].strip() == words.strip()


def test_names_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {b: 1}\nc: [*a, *a]\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a mapping of options; it is empty"),
        ("- 1", "must be a mapping of options; it is [1]"),
        ("trainer: 5", "trainer must be a mapping of options, and left out where it has none; it is 5"),
        ("trainer: [1, 2]", "trainer must be a mapping of options, and left out where it has none; it is [1, 2]"),
        (
            "trainer:\n# max_epochs: 3",
            "trainer must be a mapping of options, and left out where it has none; it is empty",
        ),
        ("data:", "data must be a mapping of options, and left out where it has none; it is empty"),
        ("data: {init_args: 7}", "data.init_args must be a mapping of options; it is 7"),
        ("model: x.yaml", "model must be a mapping of options, and left out where it has none; it is 'x.yaml'"),
    ],
)
def test_sections_of_another_shape(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(content)
    status, line = fails([*FIT, "--config", "x.yaml", "--run_dir", "run"], capsys)
    assert status == 2 and f"config = x.yaml: {message}" in line


FROM_A_FILE = {
    "data.task": "x.yaml",
    "model.backbone": "x.yaml",
    "model": "Unexpected import path format",
    "model.adapter": "x.yaml: an option's value is not read from a file; write it out, or use --config",
    "trainer": "x.yaml: an option's value is not read from a file; write it out, or use --config",
    "data": "Unexpected import path format",
}


@pytest.mark.parametrize("option", FROM_A_FILE)
def test_a_value_is_not_read_from_a_file(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text(LAUGHS)
    words = [*FIT, "--run_dir", str(tmp_path / "run"), f"--{option}", str(tmp_path / "x.yaml")]
    status, line = fails(words, capsys)
    assert status == 2 and FROM_A_FILE[option] in line


def test_a_text_that_is_yaml_is_looked_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "{" + LAUGHS.replace("\n", ", ") + "}"
    status, line = fails([*FIT, "--run_dir", str(tmp_path / "run"), "--data.task", text], capsys)
    assert status in (1, 2) and "would be more than 100,000 values" in line
