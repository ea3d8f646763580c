"""Packed blocks."""

from __future__ import annotations

import builtins
import errno
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning import atomic
from peft_lightning.backbones.toy import TOY_WORDS, toy_tokenizer
from peft_lightning.data import pack
from peft_lightning.data.documents import Corpus, Piece
from peft_lightning.data.pack import Blocks, packed
from peft_lightning.data.vocabulary import Vocabulary, read_vocabulary
from peft_lightning.errors import DataError
from tests.reference.corpus import blocks_of

WORDS = [word for words in TOY_WORDS.values() for word in words]
VOCABULARY = read_vocabulary(toy_tokenizer())


def of(*contents: str, digest: str = "mine") -> Corpus:
    """A corpus of these documents."""
    return Corpus(name="mine", digest=digest, read=lambda: (Piece(*pair) for pair in enumerate(contents)))


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of one to 30 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 31))) for _ in range(count)]


def all_of(blocks: Blocks) -> list[list[int]]:
    """All blocks."""
    return [blocks.rows(np.array([number]))[0].tolist() for number in range(len(blocks))]


def refuse() -> Iterator[Piece]:
    """Read nothing: the file has to do."""
    raise AssertionError("the corpus was read again")


# -- what is packed


@given(
    contents=st.lists(st.sampled_from(["", " ", "the cat", "a", "dog " * 9, "fish is huge\n"]), max_size=25),
    block_size=st.integers(4, 20),
    together=st.integers(1, 40),
    rows=st.integers(1, 3),
    data=st.data(),
)
def test_equals_the_oracle(
    tmp_path_factory: pytest.TempPathFactory,
    contents: list[str],
    block_size: int,
    together: int,
    rows: int,
    data: st.DataObject,
) -> None:
    expected = blocks_of(contents, toy_tokenizer(), block_size)
    pieces = []
    for number, text in enumerate(contents):
        words = text.split()
        cut = data.draw(st.integers(0, len(words)))
        pieces += [Piece(number, " ".join(words[:cut])), Piece(number, " ".join(words[cut:]))]
    corpus = Corpus(name="mine", digest="mine", read=lambda: iter(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "_TOGETHER", together)
        patch.setattr(pack, "_ROWS", rows)
        folder = tmp_path_factory.mktemp("cache")
        if not expected:
            with pytest.raises(DataError):
                packed(corpus, VOCABULARY, block_size, folder)
            return
        blocks = packed(corpus, VOCABULARY, block_size, folder)
        assert all_of(blocks) == expected
        assert len(blocks) == len(expected) and blocks.block_size == block_size
        ordinary = [sum(bool(VOCABULARY.ordinary_V[token]) for token in block) for block in expected]
        for least in range(block_size + 1):
            chosen = blocks.having(least)
            kept = [block for block, count in zip(expected, ordinary, strict=True) if count >= least]
            assert len(chosen) == len(kept) and all_of(chosen) == kept
        assert all_of(blocks) == expected
        for share in (0.01, 0.3, 0.5, 1.0):
            most = blocks.words(share)
            shares = [len(blocks.having(count)) / len(blocks) for count in (most, most + 1)]
            assert shares[0] >= share > shares[1]
        assert blocks.documents == sum(bool(text.strip()) for text in contents)
        unknown = sum(token == VOCABULARY.unknown for block in expected for token in block)
        assert blocks.unknown == pytest.approx(unknown / (len(expected) * block_size))


def test_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_ROWS", 4)
    blocks = packed(of(*texts(40)), VOCABULARY, 16, tmp_path)
    whole = all_of(blocks)
    numbers = np.array([7, 0, len(blocks) - 1, 7])
    assert blocks.rows(numbers).tolist() == [whole[number] for number in numbers]


@pytest.mark.parametrize("words", [0, 14, 15])
def test_blocks_with_words_enough_in_any_order_and_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: int
) -> None:
    monkeypatch.setattr(pack, "_ROWS", 3)
    blocks = packed(of(*texts(60)), VOCABULARY, 16, tmp_path)
    kept = [block for block in all_of(blocks) if VOCABULARY.ordinary_V[block].sum() >= words]
    assert len(kept) > 3 and (words == 0 or len(kept) < len(blocks))
    numbers = np.array([3, 0, len(kept) - 1, 3])
    for chosen in (blocks.having(words), pickle.loads(pickle.dumps(blocks.having(words)))):
        assert len(chosen) == len(kept)
        assert chosen.rows(numbers).tolist() == [kept[number] for number in numbers]
    assert len(blocks.having(words).having(0)) == len(blocks)


def test_blocks_are_mapped_and_small(tmp_path: Path) -> None:
    blocks = packed(of(*texts(400)), VOCABULARY, 16, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    assert path.stat().st_size < (2 * 16 + 4) * len(blocks) + 3000
    assert not blocks._parts[0].flags.owndata and not blocks._parts[0].flags.writeable
    assert all_of(pickle.loads(pickle.dumps(blocks))) == all_of(blocks)


def test_large_vocabulary_needs_larger_numbers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    roles = {"cls_token": "c", "sep_token": "s", "mask_token": "m", "pad_token": "p", "unk_token": "u"}
    words = {**{token: number for number, token in enumerate(roles.values())}, "low": 65_535, "high": 70_000}
    backend = Tokenizer(models.WordLevel(words, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, **roles))
    blocks = packed(of("low high low"), vocabulary, 5, tmp_path)
    assert all_of(blocks) == [[0, 65_535, 70_000, 65_535, 1]]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    encode = pack._together

    def watched(corpus: Corpus) -> Iterator[list[Piece]]:
        for pieces in encode(corpus):
            sizes.append(sum(len(piece.text) for piece in pieces))
            yield pieces

    monkeypatch.setattr(pack, "_TOGETHER", 1000)
    monkeypatch.setattr(pack, "_together", watched)
    packed(of(*texts(300)), VOCABULARY, 16, tmp_path)
    assert len(sizes) > 10 and max(sizes) < 1300


# -- the file


def test_a_corpus_is_packed_once(tmp_path: Path) -> None:
    first = packed(of(*texts(40)), VOCABULARY, 16, tmp_path)
    again = packed(Corpus(name="mine", digest="mine", read=refuse), VOCABULARY, 16, tmp_path)
    assert all_of(first) == all_of(again)


def other_tokens() -> Vocabulary:
    """The toy vocabulary in which another word separates."""
    tokenizer = toy_tokenizer()
    tokenizer.sep_token = "cat"
    return read_vocabulary(tokenizer)


@pytest.mark.parametrize(
    "change",
    [{"corpus": of(*texts(40, 1), digest="other")}, {"block_size": 17}, {"vocabulary": other_tokens()}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_result_changes_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"corpus": of(*texts(40)), "vocabulary": VOCABULARY, "block_size": 16, "folder": tmp_path}
    before, after = packed(**options), packed(**{**options, **change})
    assert all_of(before) != all_of(after)
    assert len(list(tmp_path.glob("*.arrow"))) == 2


@pytest.mark.parametrize("cut", [0, 1, 8, 100, 2000, -9, -1])
def test_truncated_file_is_built_again(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    whole = all_of(packed(of(*texts(200)), VOCABULARY, 16, tmp_path))
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:cut])
    assert all_of(packed(of(*texts(200)), VOCABULARY, 16, tmp_path)) == whole
    assert f"{path.name} is damaged and is built again" in caplog.text


def test_any_damaged_byte_is_found_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_ROWS", 20)
    corpus = of(*texts(60))
    blocks = packed(corpus, VOCABULARY, 16, tmp_path)
    whole, some = all_of(blocks), all_of(blocks.having(14))
    (path,) = tmp_path.glob("*.arrow")
    content = path.read_bytes()
    found = 0
    for position in range(0, len(content), 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            read = Blocks(path, path.stem)
            assert all_of(read) == whole and all_of(read.having(14)) == some
        except (ValueError, OSError):
            found += 1
    assert found > 16 * len(whole) * 2 / 5, "what the blocks themselves hold"


def test_file_of_another_key_is_not_trusted(tmp_path: Path) -> None:
    packed(of(*texts(40), digest="other"), VOCABULARY, 16, tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    with pytest.raises(ValueError, match="of another corpus"):
        Blocks(path, "key")


# -- what is refused


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ((), "mine: has no text; allowed with block_size 16: 15 tokens"),
        ((" ", "\n"), "mine: has no text; allowed with block_size 16: 15 tokens"),
        (("the cat", "the dog"), "mine: has 6 tokens in 2 documents; allowed with block_size 16: 15 tokens"),
    ],
)
def test_too_little_text(tmp_path: Path, contents: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        packed(of(*contents), VOCABULARY, 16, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_just_enough_text(tmp_path: Path) -> None:
    assert len(packed(of("cat " * 14), VOCABULARY, 16, tmp_path)) == 1


def test_reader_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def read() -> Iterator[Piece]:
        yield from (Piece(number, "cat " * 20) for number in range(2000))
        raise DataError("file.txt: is no UTF-8 text")

    with pytest.raises(DataError, match="^file.txt: is no UTF-8 text$"):
        packed(Corpus(name="mine", digest="mine", read=read), VOCABULARY, 16, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("room", [0, 100, 50_000])
def test_disk_that_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    corpus = of(*texts(4000))

    def opened(path: Any, mode: str) -> Any:
        file: Any = builtins.open(path, mode)
        real, written = file.write, 0

        class Full:
            """A file on a disk that has some room left."""

            def write(self, content: Any) -> int:
                nonlocal written
                written += len(memoryview(content).cast("B"))
                if written > room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return int(real(content))

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Full()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "open", opened, raising=False)
        with pytest.raises(DataError, match=r"^cache_dir '.*' cannot be written: .*No space left on device$"):
            packed(corpus, VOCABULARY, 16, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(packed(corpus, VOCABULARY, 16, tmp_path)) > 1000


def test_what_takes_long_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    packed(of(*texts(40)), VOCABULARY, 16, tmp_path)
    assert "packing mine into blocks of 16 tokens" in caplog.text
