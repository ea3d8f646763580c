"""The documents of a corpus."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning.data import documents
from peft_lightning.data.documents import Corpus, Piece, held_out_part, open_corpus
from peft_lightning.errors import DataError, UsageError


def texts(corpus: Corpus | None) -> list[str]:
    """The documents."""
    assert corpus is not None
    found: dict[int, str] = {}
    last = -1
    for number, text in corpus.read():
        assert text and number >= last
        found[number], last = found.get(number, "") + text, number
    return [text.strip() for text in found.values()]


def of(*contents: str) -> Corpus:
    """A corpus of these documents."""
    return Corpus(name="mine", digest="mine", read=lambda: (Piece(*pair) for pair in enumerate(contents)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a file of each split."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split} 1\n\n{split} 2\n")
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "train.csv").write_text("text\n")
    return tmp_path


# -- which files


def test_folder_with_splits(folder: Path) -> None:
    for split in ("train", "validation", "test"):
        assert texts(open_corpus(str(folder), split)) == [f"{split} 1", f"{split} 2"]
        assert texts(open_corpus(str(folder), split, unmarked="validation")) == [f"{split} 1", f"{split} 2"]
    (folder / "train.jsonl").write_text('{"text": "more"}\n')
    assert texts(open_corpus(str(folder), "train")) == ["more", "train 1", "train 2"]
    (folder / "validation.txt").unlink()
    assert open_corpus(str(folder), "validation") is None


@pytest.mark.parametrize("unmarked", ["train", "validation"])
def test_what_names_no_split(tmp_path: Path, unmarked: str) -> None:
    (tmp_path / "b.TXT").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub").mkdir()
    entries: list[Any] = [str(tmp_path), [str(tmp_path / "a.md"), tmp_path / "b.TXT"], [tmp_path / "a.md", tmp_path]]
    for inputs, expected in zip(entries, (["a", "b"], ["a", "b"], ["a", "a", "b"]), strict=True):
        for split in ("train", "validation", "test"):
            corpus = open_corpus(inputs, split, unmarked=unmarked)
            assert (texts(corpus) == expected) if split == unmarked else (corpus is None)


def fill(folder: Path, *names: str) -> None:
    """Make files that hold their own paths."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("unmarked", ["train", "validation"])
def test_folders_in_a_folder_are_read(tmp_path: Path, unmarked: str) -> None:
    read = ["README.md", "a/1.txt", "a/b/c/2.txt", "a/test.txt", "b.txt", "z/train/3.txt"]
    fill(tmp_path, *reversed(read), "a/4.csv", ".5.txt", ".git/6.txt", "a/.7/8.txt", "a/.9.txt")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    for split in ("train", "validation", "test"):
        corpus = open_corpus(str(tmp_path), split, unmarked=unmarked)
        assert (texts(corpus) == read) if split == unmarked else (corpus is None)


def test_only_what_is_below_may_be_hidden(tmp_path: Path) -> None:
    fill(tmp_path / ".corpus", "a/1.txt")
    assert texts(open_corpus(str(tmp_path / ".corpus"), "train")) == ["a/1.txt"]


def test_folders_name_splits(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.txt", "train/a/test.txt", "train.txt", "validation/2.txt", "notes.txt", "other/train.txt")
    assert texts(open_corpus(str(tmp_path), "train")) == ["train/1.txt", "train/a/test.txt", "train.txt"]
    assert texts(open_corpus(str(tmp_path), "validation")) == ["validation/2.txt"]
    assert open_corpus(str(tmp_path), "test") is None


def test_folder_in_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "1.txt", "a/2.txt")
    real = os.scandir

    def scan(path: Any) -> Any:
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(DataError, match=r"inputs cannot be read: .*Permission denied: '.*/a'"):
        open_corpus(str(tmp_path), "train")


def test_many_files_have_a_short_name(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{number}.txt" for number in range(9)))
    corpora = open_corpus(str(tmp_path), "train"), open_corpus([str(tmp_path / f"{n}.txt") for n in range(4)], "train")
    assert corpora[0] is not None and corpora[1] is not None
    assert corpora[0].name == ", ".join([*(str(tmp_path / f"{number}.txt") for number in range(3)), "6 more"])
    assert corpora[1].name.count(".txt") == 4


def test_documents_of_several_files_stay_apart(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts(open_corpus(str(tmp_path), "train")) == ["a", "b", "c"]


def test_home_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert texts(open_corpus("~/a.txt", "train")) == ["a"]


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {split: datasets.Dataset.from_list([{"text": f"{split} 1"}, {"text": f"{split} 2"}]) for split in "ab"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": data["a"], "validation": data["b"]})
    assert texts(open_corpus("some/name", "train")) == ["a 1", "a 2"]
    assert texts(open_corpus("some/name:configuration", "validation")) == ["b 1", "b 2"]
    assert open_corpus(["some/name"], "test") is None
    train, validation = (open_corpus("some/name", split) for split in ("train", "validation"))
    assert train is not None and validation is not None and train.digest != validation.digest
    assert train.name == "hub data set some/name, split train"


def test_without_inputs_it_is_what_ships_with_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "offline_documents", lambda: ("one", "two"))
    assert texts(open_corpus(None, "train")) == ["one", "two"]
    assert open_corpus(None, "validation") is None and open_corpus(None, "test") is None


# -- what decides the digest


def test_digest_follows_contents_and_their_order(tmp_path: Path) -> None:
    def digest(*names: str) -> str:
        corpus = open_corpus([str(tmp_path / name) for name in names], "train")
        assert corpus is not None
        return corpus.digest

    for name, content in [("a.txt", "x"), ("b.txt", "y"), ("c.txt", "x"), ("x.md", "x"), ("x.jsonl", "x")]:
        (tmp_path / name).write_text(content)
    assert digest("a.txt") == digest("c.txt")
    digests = [("a.txt",), ("b.txt",), ("a.txt", "b.txt"), ("b.txt", "a.txt"), ("a.txt", "a.txt"), ("x.jsonl",)]
    assert len({digest(*names) for names in digests}) == len(digests)
    before = digest("a.txt")
    (tmp_path / "a.txt").write_text("z")
    assert digest("a.txt") != before


# -- pieces


@given(
    contents=st.lists(st.text(st.sampled_from("ab \n"), max_size=40), max_size=5),
    size=st.integers(1, 12),
)
def test_pieces_make_the_documents(tmp_path_factory: pytest.TempPathFactory, contents: list[str], size: int) -> None:
    path = tmp_path_factory.mktemp("rows") / "file.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in contents))
    corpus = open_corpus(str(path), "train")
    assert corpus is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_PIECE", size)
        pieces = list(corpus.read())
    assert all(0 < len(piece.text) <= size for piece in pieces)
    whole: dict[int, list[str]] = {}
    for piece in pieces:
        whole.setdefault(piece.document, []).append(piece.text)
    assert ["".join(parts) for parts in whole.values()] == [text for text in contents if text]
    for parts in whole.values():
        for before, after in zip(parts, parts[1:], strict=False):
            # A word is cut only where it fills a piece by itself.
            assert after[0] in " \n" or len(before) == size and not {*before[1:]} & {*" \n"}


# -- holding out


@given(count=st.integers(0, 200), share=st.floats(0.01, 0.99))
def test_each_document_is_on_one_side(count: int, share: float) -> None:
    corpus = of(*(f"document {number}" for number in range(count)))
    if count == 1:
        assert texts(held_out_part(corpus, share, inside=False)) == ["document 0"]
        with pytest.raises(DataError, match="is one short document, of which nothing can be held out; allowed: inputs"):
            texts(held_out_part(corpus, share, inside=True))
        return
    inside, outside = (texts(held_out_part(corpus, share, inside=side)) for side in (True, False))
    assert sorted(inside + outside) == sorted(texts(corpus))
    assert not {*inside} & {*outside}
    assert not count or inside and outside
    assert inside == sorted(inside, key=lambda text: int(text.split()[1]))


def test_share_of_documents_is_held_out() -> None:
    corpus = of(*(f"document {number}" for number in range(20_000)))
    parts = [texts(held_out_part(corpus, share, inside=True)) for share in (0.05, 0.3)]
    assert [len(part) / 20_000 for part in parts] == pytest.approx([0.05, 0.3], abs=0.01)
    assert {*parts[0]} < {*parts[1]}
    # Neighbours are no more often together than others.
    numbers = {int(text.split()[1]) for text in parts[1]}
    assert sum(number + 1 in numbers for number in numbers) / len(numbers) == pytest.approx(0.3, abs=0.03)


def test_documents_added_at_the_end_change_no_side() -> None:
    few, many = ([f"document {number}" for number in range(count)] for count in (100, 150))
    old, new = (texts(held_out_part(of(*contents), 0.2, inside=True)) for contents in (few, many))
    assert old == [text for text in new if text in few]


def test_pieces_of_a_document_stay_together() -> None:
    corpus = Corpus(
        name="mine",
        digest="mine",
        read=lambda: (Piece(number, f"{number} {part};") for number in range(50) for part in "ab"),
    )
    found = texts(held_out_part(corpus, 0.5, inside=True))
    assert 10 < len(found) < 40
    assert all(text == f"{text.split()[0]} a;{text.split()[0]} b;" for text in found)


def test_one_very_long_document_can_be_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONG", 30)
    corpus = Corpus(name="mine", digest="mine", read=lambda: (Piece(0, f"part {number:5};") for number in range(900)))
    inside, outside = (texts(held_out_part(corpus, 0.2, inside=side)) for side in (True, False))
    parts = [[part for text in side for part in text.split(";") if part] for side in (inside, outside)]
    assert sorted(parts[0] + parts[1]) == [f"part {number:5}" for number in range(900)]
    assert len(parts[0]) / 900 == pytest.approx(0.2, abs=0.06)
    # What follows a gap is another document: no number is missing within one.
    for side in (inside, outside):
        for text in side:
            numbers = [int(part.split()[1]) for part in text.split(";") if part]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("size", [2000, 5200, 45_000, 60_000, 90_000])
def test_one_text_is_divided_however_short(share: float, size: int) -> None:
    text = " ".join(f"{number:09}" for number in range(size // 10))
    corpus = Corpus(name="mine", digest="mine", read=lambda: documents._pieces([(0, text)]))
    inside, outside = (texts(held_out_part(corpus, share, inside=side)) for side in (True, False))
    words = [[word for text in side for word in text.split()] for side in (inside, outside)]
    assert sorted(words[0] + words[1]) == text.split(), "a word is cut, lost or there twice"
    assert min(map(len, words)) >= 20
    if share > 0.1 and size > 40_000:
        assert len(words[0]) / len(text.split()) == pytest.approx(share, abs=0.15)


def test_few_documents_are_divided() -> None:
    # The hash of number 26 is the first one below 0.05, and that of number 0 is below 0.3.
    for count, share, held in [(10, 0.05, 1), (20, 0.1, 2), (2, 0.3, 1), (3, 0.99, 2)]:
        corpus = of(*(f"document {number}" for number in range(count)))
        inside, outside = (texts(held_out_part(corpus, share, inside=side)) for side in (True, False))
        assert (len(inside), len(outside)) == (held, count - held)


def test_sides_and_shares_have_digests_of_their_own() -> None:
    corpus = of("a")
    sides = [(0.1, True), (0.1, False), (0.2, True), (0.2, False)]
    digests = {held_out_part(corpus, share, inside=inside).digest for share, inside in sides}
    assert len({*digests, corpus.digest}) == 5


# -- what is refused


@pytest.mark.parametrize("entry", ["/none.txt", "./none", "~/none", "none.parquet", "none/of.JSONL", ""])
def test_missing_file(entry: str) -> None:
    message = f"is '{entry}'; allowed: a file or folder that exists, or a hub name"
    with pytest.raises(UsageError, match=f"inputs {message}"):
        open_corpus([entry], "train")
    with pytest.raises(UsageError, match=f"validation {message}"):
        open_corpus(entry, "validation", unmarked="validation")


def test_folder_without_known_files(tmp_path: Path) -> None:
    (tmp_path / "file.csv").write_text("text\n")
    message = r"has no file of a known kind; allowed: .txt, .text, .md, .parquet, .jsonl, .json"
    with pytest.raises(DataError, match=message):
        open_corpus(str(tmp_path), "train")


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "file.pdf").write_text("")
    with pytest.raises(UsageError, match=r"inputs is '.*file.pdf'; allowed: a file of kind .txt, .text, .md, .parquet"):
        open_corpus(str(tmp_path / "file.pdf"), "train")


def test_no_inputs_at_all() -> None:
    with pytest.raises(UsageError, match="inputs is empty; allowed: files, folders or hub names, or null"):
        open_corpus([], "train")


@pytest.mark.parametrize("inputs", [5, True, [5], ["a.txt", None], {"a.txt": 1}, b"a.txt"])
def test_inputs_that_are_no_names(inputs: Any) -> None:
    for option, unmarked in (("inputs", "train"), ("validation", "validation")):
        with pytest.raises(UsageError) as caught:
            open_corpus(inputs, unmarked, unmarked=unmarked)
        assert str(caught.value) == f"{option} is {inputs!r}; allowed: files, folders or hub names, or null"


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.txt").write_text("a")

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "file.txt")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError, match=r"inputs cannot be read: .*Permission denied: 'file.txt'"):
        open_corpus(str(tmp_path), "train")
