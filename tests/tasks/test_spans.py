"""Windows against those of the tokenizers themselves, and labels against a slow search."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning.errors import UsageError
from peft_lightning.tasks.spans import Windows, frame_of, tokens_of
from tests.reference import squad as oracle

WORDS = ("the", "Norman", "café", "naïve", "(1066)", "don't", "...", "北京", "x", "\N{GRINNING FACE}", "\n")
TEXT = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(["", " ", "  "])), max_size=14).map(
    lambda parts: "".join(word + space for word, space in parts)
)
TEMPLATES = {
    "bert": ("[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]"),
    "roberta": ("<s> $A </s> </s> $B </s>", "<s>"),
    "xlnet": ("$A [SEP] $B:1 [SEP]:1 [CLS]:2", "[CLS]"),
    "t5": ("$A </s> $B </s>", None),
    "llama": ("<s> $A <s>:1 $B:1", None),
    "gpt": ("$A $B:1", None),
}
SPECIAL = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "<s>", "</s>"]


@lru_cache
def make(name: str) -> Any:
    """A trained byte-pair tokenizer with the special tokens of ``name``; bytes for roberta, whole words for t5."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = {
        "roberta": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama": pre_tokenizers.Metaspace(),
    }.get(name, pre_tokenizers.BertPreTokenizer())
    if name == "bert":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if name == "roberta" else []
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS[:6])] * 3, trainer)
    words = tokenizer.get_vocab()
    ids = {token: words[token] for token in SPECIAL}
    template, cls = TEMPLATES[name]
    if name == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=False
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair=template, special_tokens=list(ids.items())
        )
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (name in ("bert", "xlnet"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, pad_token="[PAD]", unk_token="[UNK]", cls_token=cls
    )


EVERY = pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gpt"])


def cut(
    name: str, questions: list[str], contexts: list[str], size: int, stride: int, longest: int = 4
) -> tuple[Windows, Any]:
    tokenizer = make(name)
    different = sorted(set(contexts))
    passages = tokens_of(different, tokenizer)
    asked = np.array([different.index(context) for context in contexts])
    frame = frame_of(tokenizer)
    options = {"size": size, "max_question": longest, "stride": stride}
    return Windows(frame, tokens_of(questions, tokenizer), passages, asked, **options), passages


@EVERY
@given(
    contexts=st.lists(TEXT.filter(str.strip), min_size=1, max_size=4),
    size=st.integers(16, 24),
    stride=st.integers(0, 5),
)
def test_windows_are_those_that_the_tokenizer_cuts(name: str, contexts: list[str], size: int, stride: int) -> None:
    tokenizer = make(name)
    questions = ["the", "x x", "the x", "x"][: len(contexts)]
    columns = cut(name, questions, contexts, size, stride, longest=6)[0].columns(characters=True)
    assert ("token_type_ids" in columns) == (name in ("bert", "xlnet"))
    options = {"truncation": "only_second", "return_overflowing_tokens": True, "return_offsets_mapping": True}
    for row, pair in enumerate(zip(questions, contexts, strict=True)):
        theirs = tokenizer(*pair, max_length=size, stride=stride, **options)
        windows = len(theirs["input_ids"])
        assert columns["sizes"][row].tolist() == [len(ids) for ids in theirs["input_ids"]]
        assert columns["input_ids"][row].tolist() == sum(theirs["input_ids"], [])
        if "token_type_ids" in columns:
            assert columns["token_type_ids"][row].tolist() == sum(theirs["token_type_ids"], [])
        parts = [theirs.sequence_ids(w) for w in range(windows)]
        kept = [
            bounds if part == 1 else (-1, -1)
            for w in range(windows)
            for bounds, part in zip(theirs["offset_mapping"][w], parts[w], strict=True)
        ]
        assert list(zip(columns["token_starts"][row], columns["token_ends"][row], strict=True)) == kept
        for w, (null, first, end) in enumerate(columns["windows"][row].reshape(-1, 3).tolist()):
            assert [place for place, part in enumerate(parts[w]) if part == 1] == list(range(first, end))
            assert parts[w][null] is None
            if tokenizer.cls_token_id is not None:
                assert theirs["input_ids"][w][null] == tokenizer.cls_token_id
            else:
                assert null == parts[w].index(None)
        assert all(values.dtype == np.int32 for values in (column[row] for column in columns.values()))


@EVERY
@given(context=TEXT.filter(lambda text: len(text.strip()) > 2), data=st.data())
def test_labels(name: str, context: str, data: st.DataObject) -> None:
    solid = [place for place, character in enumerate(context) if character.strip()]
    start = data.draw(st.sampled_from(solid))
    end = data.draw(st.sampled_from([place for place in solid if place >= start])) + 1
    windows, passages = cut(name, ["x", "x"], ["the x", context], 9, 2)
    asked = windows.asked
    first, last = passages.between(asked, np.array([0, start]), np.array([0, end]))
    labels, columns = windows.labels(first, last), windows.columns(characters=True)
    marks = columns["windows"][1].reshape(-1, 3).tolist()
    assert labels[0].tolist() == [columns["windows"][0][0]] * 2  # no answer
    bounds = list(zip(passages.starts.tolist(), passages.ends.tolist(), strict=True))
    begin, stop = passages.offsets[asked[1]], passages.offsets[asked[1] + 1]
    whole = oracle.place(bounds[begin:stop], [True] * int(stop - begin), start, end)
    ends = np.cumsum(columns["sizes"][1])
    for w, (label, mark) in enumerate(zip(labels[1].reshape(-1, 2).tolist(), marks, strict=True)):
        tokens = slice(ends[w] - columns["sizes"][1][w], ends[w])
        offsets = list(
            zip(columns["token_starts"][1][tokens].tolist(), columns["token_ends"][1][tokens].tolist(), strict=True)
        )
        inside = [mark[1] <= t < mark[2] for t in range(len(offsets))]
        found = oracle.place(offsets, inside, start, end)
        # tokens can hold the same characters, as bytes do: the window must hold as many as the passage
        if whole is None or found is None or found[1] - found[0] < whole[1] - whole[0]:
            found = (mark[0], mark[0])
        assert tuple(label) == found


def test_a_long_question_is_cut_and_a_passage_may_be_empty() -> None:
    windows, _ = cut("bert", ["x x x x x x x", "x"], ["", "the"], 12, 1)
    columns = windows.columns(characters=False)
    x = tokens_of(["x"], make("bert")).ids.tolist()
    cls, sep = 2, 3
    assert columns["input_ids"][0].tolist() == [cls, *x * 4, sep, sep]
    assert columns["windows"][0].tolist() == [0, 6, 6]
    assert "token_starts" not in columns


def test_tokenizers_that_cannot() -> None:
    with pytest.raises(
        UsageError, match=r"encodes a pair as 'q+p+'; allowed for kind span: a question \(q\), a passage"
    ):
        frame_of(make("gpt"))
    slow: Any = SimpleNamespace(name_or_path="old", is_fast=False)
    with pytest.raises(UsageError, match="tokenizer 'old' does not tell where a token is in its text; allowed: a fast"):
        frame_of(slow)
