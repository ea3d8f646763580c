"""Tags of words: what is encoded, lost, learned, scored and answered."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from torch.testing import assert_close

from peft_lightning.backbones.toy import TOY_WORDS, toy_tokenizer
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.data.supervised import TaskDataModule
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError
from peft_lightning.layers.heads import ClassificationHead
from peft_lightning.methods import FineTuneModule, SparseAdapterModule
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.entities import entities_of
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.kinds.tags import Tags
from peft_lightning.tasks.table import Task, get_task
from tests.reference import tags as oracle
from tests.toy import build, data, tiny, trainer

NAMES = ("O", "B-PET", "I-PET", "B-WAY", "I-WAY")
FIELDS: dict[str, Any] = {
    "kind": "tags",
    "text": ("tokens",),
    "label": "tags",
    "labels": NAMES,
    "metrics": ("f1", "precision", "recall", "accuracy", "f1_WAY"),
}
TASK = Task(name="mine", **FIELDS)
MODEL: Any = None
WIDTH_8: Any = SimpleNamespace(config=SimpleNamespace(hidden_size=8))
# A word of three sub-words, one that the tokenizer drops, and one that it does not know.
WORDS = ("the", "cat", "red-dog", "\u2003", "zebra")
SENTENCES = [["the", "red-dog", "runs"], ["\u2003", "cat", "zebra"], ["cat"]]
TAGS = [["O", "B-PET", "O"], ["B-WAY", "I-PET", "I-PET"], ["B-PET"]]


def encode(rows: dict[str, Any], task: Task = TASK, tokenizer: Any = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_length": 16, "labelled": True, **options}
    return build_kind(task).encode(rows, tokenizer or toy_tokenizer(), **settings)


def batch_of(sentences: Any = SENTENCES, tags: Any = TAGS, task: Task = TASK, **options: Any) -> Any:
    rows = {"tokens": sentences, "tags": tags}
    return batch_of_lists(encode(rows, task, references=True, **options), pad_token_id=0)


def outputs_of(batch: Any, tags: list[list[str]], task: Task = TASK) -> torch.Tensor:
    """What a head that is always right puts out, and the last tag where it should not be asked."""
    words_BL = batch["inputs"]["token_words"]
    outputs = torch.zeros(*words_BL.shape, len(task.labels))
    outputs[..., -1] = 1
    for row, token in (words_BL > 0).nonzero().tolist():
        outputs[row, token, task.labels.index(tags[row][words_BL[row, token] - 1])] = 2
    return outputs


# -- encoding


@given(
    rows=st.lists(st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 4)), min_size=1, max_size=9), min_size=1),
    max_length=st.integers(3, 12),
)
def test_encoding_equals_word_by_word(rows: list[Any], max_length: int) -> None:
    columns = {"tokens": [[w for w, _ in row] for row in rows], "tags": [[t for _, t in row] for row in rows]}
    encoded = encode(columns, max_length=max_length)
    for number, (words, tags) in enumerate(zip(columns["tokens"], columns["tags"], strict=True)):
        expected = oracle.encoded(words, tags, toy_tokenizer(), max_length)
        assert {name: encoded[name][number] for name in expected} == expected
    assert set(encoded) == {"input_ids", "token_type_ids", "token_words", "labels"}


def test_a_real_tokenizers_subwords(encoder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    words = ["EU", "rejects", "Lamborghini-like", "\u200b", "pre-tokenised", "Ærø", "."]
    tags = [1, 0, 3, 4, 0, 1, 0]
    for max_length in (8, 10, 40):
        encoded = encode({"tokens": [words], "tags": [tags]}, tokenizer=tokenizer, max_length=max_length)
        expected = oracle.encoded(words, tags, tokenizer, max_length)
        assert {name: encoded[name][0] for name in expected} == expected
    assert 4 not in encoded["labels"][0] and min(encoded["token_words"][0]) < -1


def byte_level(add_prefix_space: bool) -> Any:
    """A tokenizer of bytes and a few merges that begin with a space, without special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("\u0120", "c"), ("\u0120c", "a"), ("\u0120ca", "t"), ("c", "a"), ("\u0120", "a")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<pad>"]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_byte_level_tokenizers_see_where_words_begin() -> None:
    rows = {"tokens": [["cat", "cab", "", "cat"], ["cat"], ["cat"]], "tags": [[1, 0, 0, 2], [1], [2]]}
    plain, spaced = (encode(rows, tokenizer=byte_level(flag)) for flag in (False, True))
    tokenizer = byte_level(False)
    assert plain["input_ids"][0][:3] == tokenizer(" cat cab")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(plain["input_ids"][0])[:3] == ["\u0120cat", "\u0120ca", "b"]
    assert plain["labels"][0][:3] == [1, 0, -100] and plain["labels"][0][-1] == 2
    assert plain["token_words"][0][:3] == [1, 2, -2] and plain["token_words"][0][-1] == 4
    # without special tokens rows lie end to end: each begins a word
    assert plain["token_words"][1:] == [[1], [1]] and plain["labels"][1:] == [[1], [2]]
    assert plain["input_ids"][1:] == spaced["input_ids"][1:]


def test_a_slow_tokenizer_is_refused() -> None:
    slow = SimpleNamespace(is_fast=False, name_or_path="old")
    with pytest.raises(UsageError, match="tokenizer 'old' is a SimpleNamespace; allowed for lists of words: a fast"):
        encode({"tokens": [["cat"]], "tags": [[0]]}, tokenizer=slow)


def test_a_tokenizer_that_cuts_at_the_left_is_refused() -> None:
    left = toy_tokenizer()
    left.truncation_side = "left"
    with pytest.raises(UsageError, match="tokenizer cuts at the left; allowed for kind tags: at the right"):
        encode({"tokens": [["cat"]], "tags": [[0]]}, tokenizer=left)


def test_unlabelled_rows_need_no_tags_and_keep_their_names() -> None:
    task = Task(name="mine", **FIELDS, options={"id": "nr"})
    kind = build_kind(task)
    assert kind.columns(labelled=False) == ("tokens", "nr")
    assert kind.columns(labelled=True) == ("tokens", "nr", "tags")
    encoded = encode({"tokens": [["cat"]], "nr": [7]}, task, labelled=False, references=True)
    assert "labels" not in encoded
    assert json.loads(encoded["reference"][0]) == {"tokens": ["cat"], "id": 7}
    assert "reference" not in encode({"tokens": [["cat"]], "nr": [7]}, task, labelled=False)


@pytest.mark.parametrize(
    ("tokens", "tags"),
    [
        (["the", "cat"], ["O", "B-PET"]),
        (("the", "cat"), (0, 1)),
        (np.array(["the", "cat"]), np.array([0, 1])),
        ("the  cat", "O B-PET"),
        ("the cat", "0 1"),
    ],
)
def test_forms_of_words_and_tags(tokens: Any, tags: Any) -> None:
    encoded = encode({"tokens": [tokens], "tags": [tags]}, references=True)
    assert encoded["labels"] == [[-100, 0, 1, -100]]
    assert json.loads(encoded["reference"][0]) == {"tokens": ["the", "cat"], "tags": [0, 1]}


@pytest.mark.parametrize(
    ("tokens", "tags", "message"),
    [
        (None, [0], "row 8, column 'tokens': None is no list of words"),
        ([1], [0], r"row 8, column 'tokens': \[1\] is no list of words"),
        ([], [], "row 8, column 'tokens': has no words; allowed: at least one"),
        (" ", "", "row 8, column 'tokens': has no words; allowed: at least one"),
        (["cat"], None, "row 8, column 'tags': None is no list of tags"),
        (["cat"], 1, "row 8, column 'tags': 1 is no list of tags"),
        (["cat"], [0, 1], "row 8, column 'tags': 2 tags for 1 words; allowed: one tag a word"),
        (["cat"], ["B-CAR"], "row 8, column 'tags': the tag is 'B-CAR'; allowed: 0 to 4, or one of O, B-PET, I-PET"),
        (["cat"], [5], "row 8, column 'tags': the tag is 5; allowed"),
        (["cat"], [-1], "row 8, column 'tags': the tag is -1; allowed"),
        (["cat"], [None], "row 8, column 'tags': the tag is None; allowed"),
        (["cat"], [1.0], "row 8, column 'tags': the tag is 1.0; allowed"),
        (["cat"], [True], "row 8, column 'tags': the tag is True; allowed"),
    ],
)
def test_wrong_rows(tokens: Any, tags: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode({"tokens": [["cat"], tokens], "tags": [[0], tags]}, first_row=7)


IOB1 = Task(name="old", **FIELDS, options={"scheme": "IOB1"})


def test_old_tags_become_new_ones() -> None:
    old = ["I-PET", "I-PET", "B-PET", "I-PET", "O", "I-WAY", "I-PET", "B-WAY"]
    new = ["B-PET", "I-PET", "B-PET", "I-PET", "O", "B-WAY", "B-PET", "B-WAY"]
    assert [NAMES[number] for number in Tags(IOB1).target(old)] == new
    assert [NAMES[number] for number in Tags(TASK).target(old)] == old


@given(tags=st.lists(st.sampled_from(NAMES), max_size=12))
def test_new_tags_are_the_same_entities_each_with_a_begin(tags: list[str]) -> None:
    new = [NAMES[number] for number in Tags(IOB1).target(tags)]
    assert entities_of([new]) == entities_of([tags])
    assert [new[first][0] for _, first, _ in entities_of([new])] == ["B"] * len(entities_of([tags]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ("a", "b")}, r"task.text is \['a', 'b'\]; allowed for kind tags: one column, of words"),
        ({"labels": ("B-PET", "I-PET")}, "task.labels is .*; allowed for kind tags: O, B-TYPE for each type of entity"),
        ({"labels": ("O",)}, "task.labels is .*; allowed for kind tags: O"),
        ({"labels": ("O", "B-PET", "I-WAY")}, "task.labels is .*; allowed for kind tags: O"),
        ({"labels": ("O", "B-")}, "task.labels is .*; allowed for kind tags: O"),
        ({"labels": ("O", "NN", "B-PET")}, "task.labels is .*; allowed for kind tags: O"),
        ({"options": {"scheme": "BILOU"}}, "task.options.scheme is 'BILOU'; allowed: IOB2, IOB1"),
        ({"options": {"id": ["id"]}}, r"task.options.id is \['id'\]; allowed: the name of a column"),
        ({"options": {"stride": 1}}, "task.options has 'stride'; allowed for kind tags: id, scheme"),
    ],
)
def test_wrong_tasks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(Task(**{**FIELDS, **changes}))


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match="task.metrics has 'mcc'; allowed for tags: f1, precision, .*, f1_PET, f1_WAY"):
        build_kind(Task(**{**FIELDS, "metrics": ("mcc",)})).metrics()


# -- losses


def test_the_head_reads_every_token() -> None:
    head = build_kind(TASK).head(WIDTH_8, build_kind(TASK).style, 0.0)
    assert isinstance(head, ClassificationHead) and head.dense is None
    assert head(torch.randn(2, 5, 8)).shape == (2, 5, len(NAMES))


@pytest.mark.parametrize("class_weights", [None, [1.0, 5.0, 0.5, 2.0, 3.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_sums_over_first_subwords(class_weights: list[float] | None, dtype: torch.dtype) -> None:
    batch = batch_of()
    outputs = torch.randn(*batch["labels"].shape, len(NAMES), dtype=dtype)
    weights_C = None if class_weights is None else torch.tensor(class_weights)
    losses, weights = build_kind(TASK).losses(outputs, batch, weights_C)
    for row, tags in enumerate(batch["labels"].tolist()):
        loss = weight = 0.0
        for scores, tag in zip(outputs[row].float(), tags, strict=True):
            if tag != -100:
                factor = class_weights[tag] if class_weights else 1.0
                loss += factor * float(scores.exp().sum().log() - scores[tag])
                weight += factor
        assert losses[row].item() == pytest.approx(loss, rel=1e-5)
        assert weights[row].item() == pytest.approx(weight)
    assert losses.dtype == weights.dtype == torch.float32
    assert weights.tolist() == [3.0, 2.0, 1.0] or class_weights


def test_padding_changes_no_loss() -> None:
    batch, kind = batch_of(), build_kind(TASK)
    outputs = torch.randn(*batch["labels"].shape, len(NAMES))
    losses, weights = kind.losses(outputs, batch, None)
    for row in range(3):
        alone = batch_of([SENTENCES[row]], [TAGS[row]])
        length = alone["labels"].shape[1]
        one = kind.losses(outputs[row : row + 1, :length], alone, None)
        assert_close(one, (losses[row : row + 1], weights[row : row + 1]))


def test_a_sentence_of_which_nothing_is_left_weighs_nothing() -> None:
    batch = batch_of([["\u2003"]], [["B-PET"]])
    losses, weights = build_kind(TASK).losses(torch.randn(1, 2, len(NAMES)), batch, None)
    assert losses.tolist() == weights.tolist() == [0.0]
    module, rows = (
        build(FineTuneModule, task=TASK),
        [{"tokens": [word], "tags": ["B-PET"]} for word in ("\u2003", "cat")],
    )
    one, two = (
        trainer().validate(module, datamodule=data(1, TASK, rows={"validation": part}), verbose=False)[0]
        for part in (rows[1:], rows)
    )
    assert two["val/loss"] == one["val/loss"] > 0
    assert two["val/recall"] == one["val/recall"] / 2


# -- predictions, answers


def test_predictions_are_at_their_words_places() -> None:
    batch, kind = batch_of(), build_kind(TASK)
    found = kind.predictions(outputs_of(batch, TAGS), batch, MODEL)
    assert found == [TAGS[0], ["O", "I-PET", "I-PET"], TAGS[2]]
    assert kind.truths(batch) == TAGS
    cut = batch_of(max_length=4)  # two tokens of each sentence
    assert kind.predictions(outputs_of(cut, TAGS), cut, MODEL) == [
        ["O", "B-PET", "O"],
        ["O", "I-PET", "I-PET"],
        ["B-PET"],
    ]
    shorter = batch_of(max_length=3)
    assert kind.predictions(outputs_of(shorter, TAGS), shorter, MODEL)[0] == ["O", "O", "O"]
    assert kind.truths(shorter) == TAGS


def test_lost_words_count_in_the_scores() -> None:
    batch, kind = batch_of(), build_kind(TASK)
    metrics = kind.metrics()
    metrics.update(kind.predictions(outputs_of(batch, TAGS), batch, MODEL), kind.truths(batch))
    values = {name: value.item() for name, value in metrics.compute().items()}
    # the lost word is the entity of its type, and what goes on after it is another entity
    assert values == pytest.approx({"f1": 6 / 7, "precision": 1.0, "recall": 0.75, "accuracy": 6 / 7, "f1_WAY": 0.0})


def test_answers_and_the_official_file() -> None:
    task = Task(name="mine", **FIELDS, options={"id": "nr"})
    kind = build_kind(task)
    rows = {"tokens": [["a b", "red", "cat", ""], ["runs"]], "nr": ["x", "y"]}
    batch = batch_of_lists(encode(rows, task, labelled=False, references=True), pad_token_id=0)
    answers = kind.answers(outputs_of(batch, [["O", "B-PET", "I-PET", "O"], ["I-WAY"]]), batch, MODEL)
    assert answers == [
        {
            "id": "x",
            "tokens": ["a b", "red", "cat", ""],
            "tags": ["O", "B-PET", "I-PET", "O"],
            "entities": [{"type": "PET", "start": 1, "end": 3, "text": "red cat"}],
        },
        {
            "id": "y",
            "tokens": ["runs"],
            "tags": ["I-WAY"],
            "entities": [{"type": "WAY", "start": 0, "end": 1, "text": "runs"}],
        },
    ]
    text = "a_b O\nred B-PET\ncat I-PET\n_ O\n\nruns I-WAY\n\n"
    assert kind.official(answers) == {"predictions.conll": text}


def test_predict_takes_texts_and_rows() -> None:
    module = build(FineTuneModule, task="toy_tags")
    words = ["the", "red", "cat", "is", "good"]
    text, row = module.predict([" ".join(words), {"tokens": words}])
    assert text == row and text["tokens"] == words and len(text["tags"]) == 5


# -- the trivial answer


def test_baseline_is_the_most_frequent_tag(cache_dir: Path) -> None:
    train = [(["the", "cat"], "O B-PET"), (["cat", "red-dog"], "I-PET B-WAY"), (["zebra"], "B-WAY"), (["red"], "I-WAY")]
    rows = {
        "train": [{"tokens": words, "tags": tags} for words, tags in train],
        "validation": [{"tokens": ["cat", "red-dog", "dog", "\u2003", "red", "runs"], "tags": "O O O O B-PET O"}],
    }
    module = data(task=TASK, rows=rows)
    kind = build_kind(TASK)
    # "cat" has two tags once each: the first one of task.labels
    assert list(kind.baseline(module, "validation")) == [
        ([["B-PET", "B-WAY", "O", "O", "I-WAY", "O"]], [["O", "O", "O", "O", "B-PET", "O"]])
    ]


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_baseline_equals_the_slow_one(stage: str, cache_dir: Path) -> None:
    task, module = get_task("toy_tags"), data(task="toy_tags")
    train, rows = toy_rows("toy_tags", "train"), toy_rows("toy_tags", stage)
    usual = oracle.frequent([row["tokens"] for row in train], [row["label"] for row in train], task.labels)
    pairs = list(build_kind(task).baseline(module, stage))
    found = [tags for part, _ in pairs for tags in part]
    assert found == [[usual.get(word, "O") for word in row["tokens"]] for row in rows]
    assert [tags for _, part in pairs for tags in part] == [row["label"] for row in rows]
    # words alone do not tell
    scores = baseline_scores(build(FineTuneModule, task="toy_tags"), module, stage)
    assert 0.0 <= scores["f1"] < 0.6


# -- the toy task


def test_toy_tags_need_their_neighbours() -> None:
    rows = toy_rows("toy_tags", "train")
    assert rows == toy_rows("toy_tags", "train") and len(rows) == 2048
    counts: Counter[tuple[str, int]] = Counter()
    for row in rows:
        assert len(row["tokens"]) == len(row["label"])
        assert not set(row["tokens"]) - {word for words in TOY_WORDS.values() for word in words}
        counts.update((name, last - first + 1) for name, first, last in entities_of([row["label"]]))
    assert set(counts) == {(name, words) for name in ("LIKED", "DISLIKED") for words in (1, 2)}
    assert min(counts.values()) > 250
    for word in ("cat", "red"):
        tags = Counter(tag for row in rows for one, tag in zip(row["tokens"], row["label"], strict=True) if one == word)
        assert max(tags.values()) < 0.5 * tags.total()


def test_toy_splits_share_no_sentence() -> None:
    splits = [{tuple(row["tokens"]) for row in toy_rows("toy_tags", s)} for s in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) and min(map(len, splits)) > 100


def wide() -> dict[str, Any]:
    backbone = tiny(0.0)
    return {**backbone, "config": {**backbone["config"], "hidden_size": 64, "intermediate_size": 128}}


@pytest.mark.parametrize("method", [FineTuneModule, SparseAdapterModule])
def test_the_toy_task_is_learned(method: Any, cache_dir: Path) -> None:
    module = build(method, dropout=0.0, backbone=wide(), task="toy_tags")
    fit = trainer(max_epochs=8, limit_val_batches=0)
    fit.fit(module, datamodule=data(batch_size=32, task="toy_tags"))
    assert fit.test(module, datamodule=data(task="toy_tags"), verbose=False)[0]["test/f1"] >= 0.95


def test_accumulation_equals_the_large_batch(cache_dir: Path) -> None:
    """Groups of 2 x 4 rows give the gradient of 8, though their words are not equally many."""
    module = build(FineTuneModule, dropout=0.0, task="toy_tags")
    module.configure_model()
    whole = next(data(batch_size=8, task="toy_tags").batches("validation"))
    half = [{**whole, **cut(whole, part)} for part in (slice(0, 3), slice(3, None))]
    totals = [module.batch_loss(part) for part in half]
    loss, weight = module.batch_loss(whole)
    assert_close(sum(total for total, _ in totals), loss)
    assert_close(sum(part for _, part in totals), weight)
    assert weight == sum(len(row["tokens"]) for row in toy_rows("toy_tags", "validation"))


def cut(batch: Any, rows: slice) -> dict[str, Any]:
    return {"inputs": {name: part[rows] for name, part in batch["inputs"].items()}, "labels": batch["labels"][rows]}


# -- files and real data


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_every_format_gives_the_same_batches(suffix: str, tmp_path: Path, cache_dir: Path) -> None:
    rows = [{"tokens": words, "tags": tags} for words, tags in zip(SENTENCES[::2], TAGS[::2], strict=True)]
    path = tmp_path / f"validation.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif suffix in ("jsonl", "json"):
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        lines = [f"tokens{mark}tags", *(f"{' '.join(row['tokens'])}{mark}{' '.join(row['tags'])}" for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    batch = next(data(task=TASK, root=str(tmp_path)).batches("validation"))
    expected = batch_of(SENTENCES[::2], TAGS[::2])
    assert_close(batch["inputs"], expected["inputs"], rtol=0, atol=0, check_dtype=False)
    assert batch["labels"].tolist() == expected["labels"].tolist()
    assert batch["references"] == expected["references"]


def test_an_error_names_file_and_row(tmp_path: Path, cache_dir: Path) -> None:
    rows = [{"tokens": ["cat"], "tags": ["O"]}, {"tokens": ["cat"], "tags": ["O", "O"]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl: row 1, column 'tags': 2 tags for 1 words"):
        data(task=TASK, root=str(tmp_path)).labels("train")


def test_rows_of_the_table() -> None:
    conll, ontonotes = get_task("conll2003"), get_task("ontonotes")
    assert conll.labels[:3] == ("O", "B-PER", "I-PER") and len(conll.labels) == 9
    types = {name[2:] for name in ontonotes.labels if name != "O"}
    assert len(types) == 18 and len(ontonotes.labels) == 37
    assert {ontonotes.labels.index(name) for name in ("B-PERSON", "I-PERSON", "B-ORG", "I-ORG", "B-GPE")} == {
        4,
        5,
        11,
        12,
        7,
    }


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "rows", "entities"), [("train", 14041, 23499), ("validation", 3250, 5942)])
def test_conll_2003(split: str, rows: int, entities: int, shared_data: Path, cache_dir: Path, encoder: str) -> None:
    task = get_task("conll2003")
    module = TaskDataModule(task, tokenizer=encoder, root=str(shared_data), splits={"test": split})
    kind = build_kind(task)
    truths = [tags for batch in module.batches("test") for tags in kind.truths(batch)]
    assert len(truths) == rows
    assert len(entities_of(truths)) == entities
    content = parquet.read_table(shared_data / "conll2003" / f"{split}.parquet").to_pydict()
    assert truths == content["ner_tags"]
    old = Tags(Task(**{**FIELDS, "labels": task.labels, "options": {"scheme": "IOB1"}}))
    assert [[task.labels[n] for n in old.target(tags)] for tags in content["ner_tags_iob1"]] == content["ner_tags"]
