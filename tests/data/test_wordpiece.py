"""The trained tokenizer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peft_lightning.data.documents import Corpus, Piece
from peft_lightning.data.vocabulary import read_vocabulary
from peft_lightning.data.wordpiece import FEWEST_WORDS, trained_tokenizer
from peft_lightning.errors import DataError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@cache
def topics() -> tuple[str, ...]:
    """A part of the language reference: some 70,000 words."""
    from pydoc_data import topics

    return tuple(text for _, text in sorted(topics.topics.items()))[:40]


def of(*contents: str, digest: str = "mine") -> Corpus:
    """A corpus of these documents."""
    return Corpus(name="mine", digest=digest, read=lambda: (Piece(*pair) for pair in enumerate(contents)))


def refuse() -> Iterator[Piece]:
    """Read nothing: the file has to do."""
    raise AssertionError("the corpus was read again")


def vocabulary_of(folder: Path, vocab_size: int = 600) -> list[str]:
    """The words of a tokenizer that is trained on the topics, by their numbers."""
    tokenizer = trained_tokenizer(of(*topics()), vocab_size, folder)
    return tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_it_speaks_as_bert_does(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(of(*topics()), 1000, tmp_path)
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == SPECIAL
    assert len(tokenizer) == 1000
    pair = tokenizer("The Method", "statement, zyx\u4e16")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens[:2] == ["[CLS]", "the"] and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
    assert pair["token_type_ids"] == [0] * (tokens.index("[SEP]") + 1) + [1] * (len(tokens) - tokens.index("[SEP]") - 1)
    assert tokenizer.decode(pair["input_ids"], skip_special_tokens=True) == "the method statement, zyx"
    assert tokens[-2] == "[UNK]", "a sign that is not in the corpus"
    starts = read_vocabulary(tokenizer).starts()
    assert [token.startswith("##") for token in tokens] == [not starts[number] for number in pair["input_ids"]]


def test_numbers_are_those_of_bert_s_own_class(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    tokenizer = trained_tokenizer(of(*topics()), 1000, tmp_path)
    bert = BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=True)
    text = topics()[3] + " \u00c9t\u00e9, na\u00efve! [x] \u4e16\u754c"
    assert tokenizer(text)["input_ids"] == bert(text)["input_ids"]


@pytest.mark.parametrize("vocab_size", [FEWEST_WORDS, 600])
def test_vocabulary_is_no_larger_than_asked(tmp_path: Path, vocab_size: int) -> None:
    # More signs than there is room for.
    signs = " ".join(chr(0x4E00 + number) for number in range(2000))
    tokenizer = trained_tokenizer(of(*topics(), signs, signs), vocab_size, tmp_path)
    assert len(tokenizer) == vocab_size
    assert tokenizer.unk_token_id not in tokenizer("the statement (returns), or not")["input_ids"]


def test_small_corpus_has_few_words(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(of("the cat", "the cat"), 600, tmp_path)
    assert {*SPECIAL, "the", "cat"} < {*tokenizer.get_vocab()}
    assert len(tokenizer) < 40
    assert tokenizer("THE cat")["input_ids"] == tokenizer.convert_tokens_to_ids(["[CLS]", "the", "cat", "[SEP]"])


def test_training_is_the_same_each_time_and_in_each_process(tmp_path: Path) -> None:
    first = vocabulary_of(tmp_path / "first")
    assert vocabulary_of(tmp_path / "second") == first
    script = (
        "import sys; from pathlib import Path; from pydoc_data import topics\n"
        "from peft_lightning.data.documents import *; from peft_lightning.data.wordpiece import *\n"
        "texts = [text for _, text in sorted(topics.topics.items())][:40]\n"
        "corpus = Corpus(name='', digest='', read=lambda: (Piece(*pair) for pair in enumerate(texts)))\n"
        "tokenizer = trained_tokenizer(corpus, 600, Path(sys.argv[1]))\n"
        "sys.stdout.write('\\n'.join(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "third")], capture_output=True, encoding="utf-8", check=True
    )
    assert found.stdout.split("\n") == first


def test_it_is_trained_once(tmp_path: Path) -> None:
    first = vocabulary_of(tmp_path)
    tokenizer = trained_tokenizer(Corpus(name="mine", digest="mine", read=refuse), 600, tmp_path)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == first
    trained_tokenizer(of("the cat", digest="other"), 600, tmp_path)
    trained_tokenizer(of("the cat"), 500, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff"])
def test_damaged_file_is_trained_again(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    first = vocabulary_of(tmp_path)
    (path,) = tmp_path.glob("*.json")
    whole = path.read_bytes()
    path.write_bytes(damage + whole[len(damage) :] if damage == b"\xff" else damage)
    assert vocabulary_of(tmp_path) == first
    assert "is damaged and is built again: its checksum differs" in caplog.text
    assert path.read_bytes() == whole


def test_saved_folder_is_read_by_transformers(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(of(*topics()), 600, tmp_path)
    tokenizer.save_pretrained(tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert again(topics()[0])["input_ids"] == tokenizer(topics()[0])["input_ids"]
    assert again.mask_token_id == tokenizer.mask_token_id == 4


@pytest.mark.parametrize("contents", [(), (" \n",)])
def test_no_text(tmp_path: Path, contents: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="mine: has no text; allowed: some to train a tokenizer on"):
        trained_tokenizer(of(*contents), 600, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_special_words_in_the_text_are_text(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(of("[MASK] [SEP] mask sep " * 5), 600, tmp_path)
    ids = read_vocabulary(tokenizer).encoder.encode("[MASK] [SEP]", add_special_tokens=False).tokens
    assert ids == ["[", "mask", "]", "[", "sep", "]"]
