"""Sizes are looked at before memory is taken: files, JSON, headers of tensors, and names in manifests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from peft_lightning.reading.json_text import check_json_lines, parse_json
from peft_lightning.reading.limits import file_inside, read_bytes, read_safetensors, regular_size


def test_only_ordinary_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(OSError, match="is no ordinary file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a folder"):
        regular_size(tmp_path)
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes; allowed: 4"):
        read_bytes(tmp_path / "x", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (b'"\xff"', "is not UTF-8"),
        (b"[" + b"{}," * 2_000_000 + b"1]", "need more than 512 MB"),
        (b"{", "Expecting"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
    ids=["deep", "twice", "bytes", "many", "cut", "long number"],
)
def test_json_that_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_that_is_read() -> None:
    content: dict[str, Any] = {"a": [1, 2.5, None, True, "ä", {"a": {}}], "b": {"a": 10**30}}
    assert parse_json(json.dumps(content)) == content == parse_json(json.dumps(content, ensure_ascii=False).encode())
    assert parse_json('{"a": 1, "a": 2}', once=False) == {"a": 2}


def test_lines_of_json_count_together() -> None:
    check_json_lines(b'{"text": "the dog is good", "label": 1}\n' * 400_000)
    with pytest.raises(ValueError, match=r"is JSON that would need \d\.?[\d,]+ bytes as values; allowed"):
        check_json_lines((b"[" + b"{}," * 300_000 + b"1]\n") * 8)


def tensors(header: Any, payload: bytes = b"") -> bytes:
    """A file of safetensors with any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        ((1 << 40).to_bytes(8, "little"), "a header of 1,099,511,627,776 bytes in a file of 8"),
        (tensors([]), "its header is no mapping"),
        (tensors({"a": ENTRY}), "promises 8 bytes of tensors; it has 0"),
        (tensors({"a": {**ENTRY, "shape": [1 << 61]}}, bytes(8)), "promises 9,223,372,036,854,775,808 bytes"),
        (tensors({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), r"'a' has the shape \[-2\]"),
        (tensors({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)), "has the shape"),
        (tensors({"a": {**ENTRY, "dtype": "F33"}}, bytes(8)), "no dtype or no shape"),
        (tensors({"a": 1}), "no dtype or no shape"),
        (tensors({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(8)), "is no file of safetensors"),
    ],
)
def test_tensors_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    for given in (content, tmp_path / "x.safetensors"):
        with pytest.raises(ValueError, match=message):
            read_safetensors(given)


def test_tensors_that_are_read() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)
    content = {str(dtype): torch.tensor([[1, 0, 1]]).to(dtype) for dtype in dtypes} | {"none": torch.zeros(0, 3)}
    found = read_safetensors(save(content, {"any": "word"}))
    assert found.keys() == content.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in content.items())


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".", "..", "a\\b", "a\x00b", 7, "out"])
def test_names_that_lead_out_of_a_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x").write_text("secret")
    (tmp_path / "folder" / "out").symlink_to(tmp_path / "x")
    with pytest.raises(ValueError, match="no name of a file in the same folder|leads out of the folder"):
        file_inside(tmp_path / "folder", name)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "models--x" / "snapshots" / "1"
    for each in (folder, tmp_path / "models--x" / "blobs"):
        each.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs" / "0123").write_text("content")
    (folder / "config.json").symlink_to("../../blobs/0123")
    assert file_inside(folder, "config.json").read_text() == "content"
    (folder / "plain").write_text("here")
    assert file_inside(folder, "plain") == folder / "plain"
