"""The cache of encoded splits."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning.data.cache import Encoded, cache_folder, cache_key, cached
from peft_lightning.errors import DataError, UsageError

ROWS = [[5, 6, 7], [8], [9, 10]]


def batch(rows: list[list[int]] = ROWS) -> pa.RecordBatch:
    """An encoded split of ``rows`` with labels."""
    columns = {
        "input_ids": pa.array(rows, pa.large_list(pa.int32())),
        "labels": pa.array([r[0] for r in rows]),
    }
    return pa.RecordBatch.from_pydict(columns)


def refuse() -> pa.RecordBatch:
    """Build nothing: the file has to do."""
    raise AssertionError("the split was built again")


def rows_of(data: Encoded) -> list[list[int]]:
    """All rows, one at a time."""
    return [data.gather(np.array([row]))[1]["input_ids"][0].tolist() for row in range(len(data))]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    first = cached(tmp_path / "new", "key", batch)
    second = cached(tmp_path / "new", "key", refuse)
    for data in (first, second):
        assert rows_of(data) == ROWS
        assert data.lengths().tolist() == [3, 1, 2]
        assert data.scalars["labels"].tolist() == [5, 8, 9]
        assert not data.ragged["input_ids"][0].flags.owndata
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"key.arrow", "key.arrow.lock"}


@given(
    rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=8),
    data=st.data(),
)
def test_gather_equals_indexing(rows: list[list[int]], data: st.DataObject) -> None:
    values = np.array([token for row in rows for token in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)])
    encoded = Encoded({"labels": np.arange(len(rows))}, {"input_ids": (values, offsets)})
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=10))
    scalars, ragged = encoded.gather(np.array(chosen))
    assert scalars["labels"].tolist() == chosen
    assert ragged["input_ids"][0].tolist() == [token for row in chosen for token in rows[row]]
    assert ragged["input_ids"][1].tolist() == [len(rows[row]) for row in chosen]


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -9, -1])
def test_truncated_file_is_built_again(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    cached(tmp_path, "key", batch)
    path = tmp_path / "key.arrow"
    path.write_bytes(path.read_bytes()[:cut])
    assert rows_of(cached(tmp_path, "key", batch)) == ROWS
    assert "key.arrow is damaged and is built again" in caplog.text
    assert rows_of(cached(tmp_path, "key", refuse)) == ROWS


def test_any_damaged_byte_is_found_or_harmless(tmp_path: Path) -> None:
    cached(tmp_path, "key", batch)
    path = tmp_path / "key.arrow"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for flipped in (0xFF, 1 << position % 8) if position % 7 == 0 else (1 << position % 8,):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ flipped]) + whole[position + 1 :])
            data = cached(tmp_path, "key", batch)
            assert rows_of(data) == ROWS
            assert data.scalars["labels"].tolist() == [5, 8, 9] and data.scalars["labels"].dtype == np.int64


@pytest.mark.parametrize("name", [b"input_ids", b"labels"])
def test_a_column_that_lost_its_name_is_built_again(name: bytes, tmp_path: Path) -> None:
    cached(tmp_path, "key", batch)
    path = tmp_path / "key.arrow"
    path.write_bytes(path.read_bytes().replace(name + b"\x00", b"x" + name[1:] + b"\x00"))
    assert rows_of(cached(tmp_path, "key", batch)) == ROWS


def test_file_of_another_key_is_not_trusted(tmp_path: Path) -> None:
    cached(tmp_path, "other", lambda: batch([[1]]))
    (tmp_path / "other.arrow").rename(tmp_path / "key.arrow")
    assert rows_of(cached(tmp_path, "key", batch)) == ROWS


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "key", batch)
    assert [path.name for path in tmp_path.iterdir()] == ["key.arrow.lock"]


def test_one_of_several_builds(tmp_path: Path) -> None:
    """Locks are between open files, so threads compete as processes of a job do, of one machine or of many."""
    built, together = [], Barrier(4)

    def build() -> pa.RecordBatch:
        built.append(1)
        time.sleep(0.05)
        return batch()

    def work(_: int) -> list[list[int]]:
        together.wait()
        return rows_of(cached(tmp_path, "key", build))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [ROWS] * 4
    assert len(built) == 1


def test_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            order.append(name)
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    cached(tmp_path, "key", batch)
    assert order == ["fsync", "replace", "fsync"]  # the file, its new name, the folder that holds the name


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cache_dir '.*' cannot be written: .*No space left on device"):
        cached(tmp_path, "key", batch)
    assert [path.name for path in tmp_path.iterdir()] == ["key.arrow.lock"]


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache_dir '.*file' cannot be written"):
        cached(tmp_path / "file", "key", batch)


def test_digest_follows_the_content(tmp_path: Path) -> None:
    built = [cached(tmp_path, key, lambda rows=rows: batch(rows)) for key, rows in [("a", ROWS), ("b", ROWS)]]  # type: ignore[misc]
    others = [cached(tmp_path, str(number), lambda r=r: batch(r)) for number, r in enumerate([[[5]], [[5], [6]]])]  # type: ignore[misc]
    assert built[0].digest == built[1].digest == cached(tmp_path, "a", refuse).digest
    assert len({data.digest for data in (built[0], *others)}) == 3


def test_key_follows_the_parts() -> None:
    assert cache_key({"a": [1], "b": None}) == cache_key({"b": None, "a": [1]})
    assert cache_key({"a": 1}) != cache_key({"a": 2})
    assert len(cache_key({})) == 64


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_LIGHTNING_CACHE", "/from/environment")
    assert cache_folder(None) == Path("/from/environment")
    assert cache_folder("/given") == Path("/given")
    with pytest.raises(UsageError, match="cache_dir is 5; allowed: a folder, or null"):
        cache_folder(5)  # type: ignore[arg-type]
    monkeypatch.delenv("PEFT_LIGHTNING_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "peft_lightning"
