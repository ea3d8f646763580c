"""What a tokenizer's file may ask for, and that what contradicts itself is one line."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from peft_lightning.backbones.tokenizer_json import check_tokenizer
from peft_lightning.backbones.tokenizers import load_tokenizer, tokenizer_files, tokenizer_from_files
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.cli.main import main
from peft_lightning.errors import CheckpointError, UsageError
from tests.cli.test_bad_input import FIT, fails


def charsmap(trie: bytes, *texts: bytes, length: int | None = None) -> str:
    """A map of SentencePiece, with a trie of any content."""
    size = struct.pack("<I", len(trie) if length is None else length)
    return base64.b64encode(size + trie + b"".join(text + b"\0" for text in texts)).decode()


def replace(content: str) -> dict[str, Any]:
    """A rule that writes a text for each space."""
    return {"type": "Replace", "pattern": {"String": " "}, "content": content}


def template(ids: int, times: int, name: str = "X") -> dict[str, Any]:
    """Around each text: one token, some times, that stands for some numbers."""
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}}] * times
    special = {"X": {"id": "X", "ids": [1] * ids, "tokens": ["x"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "doubled ten times": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("  ")] * 10}},
        "Replace: with the rules before it, a character may become more than 256",
    ),
    "one long text": ({"normalizer": replace("x" * 300)}, "Replace: .*more than 256"),
    "put before": ({"normalizer": {"type": "Prepend", "prepend": "x" * 300}}, "Prepend: .*more than 256"),
    "a long entry": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\0" * 4, b"x" * 2000)}},
        "Precompiled: .*more than 256",
    ),
    "a cut map": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\0" * 4, b"x", length=400)}},
        "precompiled_charsmap is damaged",
    ),
    "no base64": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "\u00e9"}}, "is not base64"),
    "many tokens around": ({"post_processor": template(20, 20)}, "single puts 400 tokens around a text; allowed: 256"),
    "a token that is not there": ({"post_processor": template(1, 1, "Y")}, "single names 'Y', which is not there"),
    "no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength: length = 0"),
    "a stride": ({"truncation": {"max_length": 3, "stride": 3}}, "truncation: stride must be below max_length"),
    "a list": ([], "holds no mapping"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        check_tokenizer(content)


def test_what_there_is_passes() -> None:
    check_tokenizer(json.loads(tokenizer_files(toy_tokenizer())["tokenizer.json"]))
    longest = "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647 \u0639\u0644\u064a\u0647 \u0648\u0633\u0644\u0645"  # by NFKC
    rules = [replace("\u2581"), {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\0" * 8, longest.encode())}]
    check_tokenizer({"normalizer": {"type": "Sequence", "normalizers": rules}, "post_processor": template(1, 2)})


def broken(**rules: Any) -> dict[str, str]:
    """The toy tokenizer's files, with other rules."""
    files = tokenizer_files(toy_tokenizer())
    return {**files, "tokenizer.json": json.dumps({**json.loads(files["tokenizer.json"]), **rules})}


# A trie that leads out of itself: only the library that walks through it sees that, and panics.
ASTRAY = {"type": "Precompiled", "precompiled_charsmap": charsmap(b"\xff" * 4, b"x")}


def test_a_folder_and_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, (rules, message) in enumerate(
        [({"normalizer": replace("x" * 300)}, "Replace"), ({"normalizer": ASTRAY}, "")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in broken(**rules).items():
            (folder / name).write_text(text)
        with pytest.raises(UsageError, match=rf"{number}': its tokenizer cannot be loaded \(.*{message}"):
            load_tokenizer(str(folder))
        with pytest.raises(CheckpointError, match=rf"the tokenizer in the checkpoint is damaged \(.*{message}"):
            tokenizer_from_files(broken(**rules))


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    """transformers makes one up that knows no word."""
    config = {"model_type": "bert", "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="there are no files of a tokenizer; name one that has some"):
        load_tokenizer(str(tmp_path))


def test_a_panic_later_on_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    import peft_lightning.cli.trainer as trainer

    def run(words: list[str]) -> None:
        Tokenizer.from_str(
            json.dumps({**json.loads(toy_tokenizer().backend_tokenizer.to_str()), "normalizer": ASTRAY})
        ).encode("a")

    monkeypatch.setattr(trainer, "run", run)
    status, line = fails([*FIT, "--run_dir", str(tmp_path / "run")], capsys)
    assert status == 1 and "PanicException: index out of bounds" in line
    with pytest.raises(BaseException, match="index out of bounds"):
        main([*FIT, "--debug"])
