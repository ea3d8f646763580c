"""From rows to tensors: padded texts, and corrupted blocks."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_lightning.backbones.toy import TOY_WORDS, toy_tokenizer
from peft_lightning.data.cache import Encoded
from peft_lightning.data.collate import MaskingCollate, PaddingCollate
from peft_lightning.data.documents import Corpus, Piece
from peft_lightning.data.loader import Batch, LengthGroupedSampler
from peft_lightning.data.pack import packed
from peft_lightning.data.vocabulary import read_vocabulary
from peft_lightning.functional.corruption import uniform
from tests.reference.corruption import corrupted

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=60).map(np.array)


def split_of(lengths: np.ndarray) -> Encoded:
    """A split whose row r holds the tokens 100 r, 100 r + 1, ..., and the label r."""
    values = np.concatenate([100 * row + np.arange(n) for row, n in enumerate(lengths)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ragged = {"input_ids": (values, offsets), "token_type_ids": (values * 0 + 1, offsets)}
    return Encoded({"labels": np.arange(len(lengths))}, ragged)


def batch_of(rows: list[int], valid: bool = True, epoch: int = 0, number: int = 0, first: int = 0) -> Batch:
    """A batch whose places count from ``first``."""
    return Batch(np.array(rows), np.arange(first, first + len(rows)), epoch, number, valid)


# -- padded texts


@given(lengths=LENGTHS, batch_size=st.integers(1, 5))
def test_batches_are_padded_rows(lengths: np.ndarray, batch_size: int) -> None:
    collate = PaddingCollate(split_of(lengths), pad_token_id=7)
    for planned in LengthGroupedSampler(lengths, batch_size, shuffle=True).plan(0):
        batch = collate(planned)
        inputs, rows = batch["inputs"], batch["rows"].tolist()
        assert rows == planned.rows.tolist()
        width = max(lengths[rows])
        expected: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
        for row in rows:
            n, gap = int(lengths[row]), width - int(lengths[row])
            expected["input_ids"].append([100 * row + t for t in range(n)] + [7] * gap)
            expected["attention_mask"].append([1] * n + [0] * gap)
            expected["token_type_ids"].append([1] * n + [0] * gap)
        assert {name: values.tolist() for name, values in inputs.items()} == expected
        assert all(values.dtype == torch.int64 for values in (*inputs.values(), batch["labels"], batch["rows"]))
        assert batch["labels"].tolist() == rows
        assert batch["valid"].dtype == torch.bool and batch["valid"].all()


def test_padding_row_does_not_count() -> None:
    lengths = np.array([2, 3, 4])
    sampler = LengthGroupedSampler(lengths, 1, shuffle=False, world_size=2, rank=1)
    batches = [PaddingCollate(split_of(lengths), pad_token_id=0)(batch) for batch in sampler.plan(0)]
    assert [batch["rows"].tolist() for batch in batches] == [[1], [0]]
    assert [batch["valid"].tolist() for batch in batches] == [[True], [False]]


def test_lists_as_labels_are_padded_with_the_number_that_losses_ignore() -> None:
    data = split_of(np.array([2, 1]))
    data.ragged["labels"] = data.ragged.pop("token_type_ids")
    data.scalars.clear()
    batch = PaddingCollate(data, pad_token_id=0)(batch_of([0, 1]))
    assert batch["labels"].tolist() == [[1, 1], [1, -100]]
    assert set(batch["inputs"]) == {"input_ids", "attention_mask"}


def test_unlabelled_split_gives_no_labels() -> None:
    data = split_of(np.array([2, 1]))
    data.scalars.clear()
    assert set(PaddingCollate(data, pad_token_id=0)(batch_of([0, 1]))) == {"inputs", "rows", "valid"}


# -- corrupted blocks

VOCABULARY = read_vocabulary(toy_tokenizer())
WORDS = [word for words in TOY_WORDS.values() for word in words]
S, P = 16, 3


@pytest.fixture(scope="module")
def collates(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a collate over 40 documents of 5 to 11 words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 12))) for _ in range(40)]
    corpus = Corpus(name="toy", digest="toy", read=lambda: (Piece(*pair) for pair in enumerate(texts)))
    blocks = packed(corpus, VOCABULARY, S, tmp_path_factory.mktemp("cache"))

    def make(**options: Any) -> MaskingCollate:
        return MaskingCollate(blocks, VOCABULARY, **{"targets": P, "batch_size": 4, **options})

    return make


def test_training_batch_equals_the_oracle(collates: Any) -> None:
    collate = collates(seed=42, batches=10)
    got = collate(batch_of([5, 2, 9, 7], epoch=3, number=6, first=8))
    plain = collate.blocks.rows(np.array([5, 2, 9, 7])).tolist()
    ordinary, key = set(np.flatnonzero(VOCABULARY.ordinary_V).tolist()), (1, 42, 36)
    expected = [
        corrupted(ids, P, place, key, VOCABULARY.mask, ordinary) for place, ids in zip(range(8, 12), plain, strict=True)
    ]
    for name, values in zip(("input_ids", "targets", "labels"), zip(*expected, strict=True), strict=True):
        assert got[name].tolist() == list(values)
        assert got[name].dtype == torch.int64
    assert got["noise"].tolist() == uniform(np.arange(8, 12), S, key).tolist()
    assert got["noise"].dtype == torch.float32
    assert got["rows"].tolist() == [5, 2, 9, 7] and got["rows"].dtype == torch.int64
    assert got["valid"].tolist() == [True] * 4 and got["valid"].dtype == torch.bool
    assert set(got) == {"input_ids", "targets", "labels", "noise", "rows", "valid"}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two batches are equal in all but what rows they are."""
    return all(torch.equal(first[name], second[name]) for name in first)


def test_what_training_masks_follow_from(collates: Any) -> None:
    def draw(collate: MaskingCollate, **place: int) -> dict[str, torch.Tensor]:
        return collate(batch_of([5, 2, 9, 7], True, **place))

    base = draw(collates(seed=42, batches=10), epoch=1, number=2)
    assert same(base, draw(collates(seed=42, batches=10), epoch=1, number=2))
    assert same(base, draw(collates(seed=42, batches=10), epoch=0, number=12)), "it is the step that counts"
    for other in (
        draw(collates(seed=42, batches=10), epoch=1, number=3),
        draw(collates(seed=43, batches=10), epoch=1, number=2),
        draw(collates(seed=42, batches=10), epoch=1, number=2, first=4),
        draw(collates(), epoch=1, number=2),
    ):
        assert not torch.equal(base["targets"], other["targets"]) and not torch.equal(base["noise"], other["noise"])


def test_evaluation_masks_follow_from_the_block_alone(collates: Any) -> None:
    collate = collates()
    whole = collate(batch_of([5, 2, 9, 7], epoch=4, number=3, first=8))
    parts = [collate(batch_of([9, 5])), collate(batch_of([7])), collates(batch_size=1)(batch_of([2]))]
    masks = {
        row: [batch[name][place].tolist() for name in ("input_ids", "targets", "noise")]
        for batch in parts
        for place, row in enumerate(batch["rows"].tolist())
        if batch["valid"][place]
    }
    assert set(masks) == {5, 2, 9, 7}
    for place, row in enumerate([5, 2, 9, 7]):
        assert masks[row] == [whole[name][place].tolist() for name in ("input_ids", "targets", "noise")]


def test_shapes_stay_where_rows_run_out(collates: Any) -> None:
    collate = collates()
    short, none = collate(batch_of([3, 8])), collate(batch_of([3], valid=False))
    assert {name: values.shape for name, values in short.items()} == {
        name: values.shape for name, values in collate(batch_of([0, 1, 2, 3])).items()
    }
    assert short["valid"].tolist() == [True, True, False, False]
    assert short["rows"].tolist() == [3, 8, 3, 3]
    assert none["valid"].tolist() == [False] * 4


def test_documents_end_with_their_separators(collates: Any) -> None:
    collate = collates(separate_documents=True)
    batch = collate(batch_of([0, 1, 2, 3]))
    plain = collate.blocks.rows(np.arange(4))
    expected = []
    for ids in plain.tolist():
        row, document = [], 0
        for position, token in enumerate(ids):
            row.append(document)
            document += position > 0 and token == VOCABULARY.separator
        expected.append(row)
    assert batch["documents"].tolist() == expected
    assert batch["documents"].dtype == torch.int64
    assert len({number for row in expected for number in row}) > 2


def test_whole_words_are_an_option(collates: Any) -> None:
    # With a token per word it changes nothing; the oracle of words is in tests/functional/test_corruption.py.
    batch = batch_of([0, 1, 2, 3])
    assert same(collates(whole_words=True)(batch), collates()(batch))
    assert collates(whole_words=True).starts_V.all()


def test_collate_goes_to_another_process(collates: Any) -> None:
    collate, batch = collates(seed=1, batches=5), batch_of([0, 1, 2, 3])
    content = pickle.dumps(collate)
    assert same(pickle.loads(content)(batch), collate(batch))
    assert collate.blocks.rows(np.array([0]))[0].tobytes() not in content, "the blocks travel with it"
