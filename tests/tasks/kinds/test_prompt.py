"""The kind of task that is read out with words: encoding, demonstrations, losses, answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import FewShotDataModule, FineTuneModule, load
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.kinds.prompt import Prompt
from peft_lightning.tasks.prompts import prompted
from peft_lightning.tasks.table import Task, get_task
from tests.toy import build, trainer

TOKENIZER: Any = toy_tokenizer()
MODEL: Any = None
TEXTS = ["the cat is good", "the dog is bad", "that red cat is clever", "this fish is lazy", "the fish is brave"]
LABELS = [1, 0, 1, 0, 1]
ROWS: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
SCORE = get_task("toy_similarity+prompt")


def shown(mode: str = "prompt-demo", **options: Any) -> Task:
    """The toy task with examples of its own."""
    return prompted(get_task("toy_sentiment"), mode, **{"shots": ROWS, **options})


def encode(task: Task, rows: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    settings: dict[str, Any] = {"max_length": 64, "labelled": True, **options}
    return build_kind(task).encode(columns, TOKENIZER, **settings)


def words(tokens: list[int]) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(tokens))


def sequences(columns: Mapping[str, Any], row: int) -> list[tuple[str, int]]:
    """Words of each sequence of a row, and the place of its mask."""
    start, found = 0, []
    for size in columns["sizes"][row]:
        part = slice(start, start + size)
        assert sum(columns["token_mask"][row][part]) == 1
        found.append((words(columns["input_ids"][row][part]), columns["token_mask"][row][part].index(1)))
        start += size
    assert start == len(columns["input_ids"][row]) == len(columns["token_type_ids"][row])
    return found


# -- what is encoded


def test_a_prompt_is_one_sequence() -> None:
    columns = encode(get_task("toy_sentiment+prompt"), ROWS[:2])
    assert words(columns["input_ids"][0]) == "[CLS] the cat is good this is [MASK] [SEP]"
    assert columns["token_mask"][0] == [0] * 7 + [1, 0]
    assert columns["token_type_ids"][0] == [0] * 9
    assert columns["labels"] == [1, 0] and "sizes" not in columns


def test_what_is_too_long_shortens_the_text() -> None:
    columns = encode(SCORE, [{"sentence1": "the cat runs " * 9, "sentence2": "the dog", "label": 2.0}], max_length=10)
    assert words(columns["input_ids"][0]) == "[CLS] the cat runs the cat [MASK] the dog [SEP]"
    with pytest.raises(DataError, match="row 7: template and examples take 3 of 4 tokens and leave no room"):
        encode(SCORE, [{"sentence1": "the cat", "sentence2": "the dog", "label": 2.0}], max_length=4, first_row=7)


def test_one_set_in_training_and_several_elsewhere() -> None:
    training = encode(shown(), ROWS)
    for row, text in enumerate(TEXTS):
        ((sequence, place),) = sequences(training, row)
        query, bad, good, rest = sequence.split(" [SEP]")
        assert query == f"[CLS] {text} this is [MASK]" and place == len(query.split()) - 1 and rest == ""
        for example, label, word in ((bad, 0, "bad"), (good, 1, "good")):
            own = [other for other in ROWS if other["label"] == label and other["text"] != text]
            assert example.strip() in [f"{other['text']} this is {word}" for other in own]
    assert training["token_type_ids"][0] == [0] * 9 + [1] * (len(training["input_ids"][0]) - 9)


@pytest.mark.parametrize(
    "options", [{"references": True}, {"labelled": False}, {"labelled": False, "references": True}]
)
def test_as_many_sets_as_there_are(options: dict[str, Any]) -> None:
    # a text is no example of itself: 2 x 2 sets for a good one, 1 x 3 for a bad one
    for wanted, expected in ((16, [4, 3, 4, 3, 4]), (3, [3] * 5)):
        columns = encode(shown(sets=wanted), ROWS, **options)
        for row in range(5):
            found = sequences(columns, row)
            assert len(set(found)) == len(found) == expected[row]


def test_examples_are_never_cut() -> None:
    rows = [{"text": "the cat is good " * 20, "label": 1}]
    for length in (25, 30, 40):
        columns = encode(shown(), rows, references=True, max_length=length)
        for sequence, _ in sequences(columns, 0):
            assert len(sequence.split()) <= length and "this is [MASK] [SEP]" in sequence
            examples = sequence.split(" [SEP] ", 1)[1]
            assert examples.removesuffix(" [SEP]").split(" [SEP] ")[0].endswith("this is bad")
            assert examples.endswith("this is good [SEP]")
    with pytest.raises(DataError, match=r"row 0: template and examples take \d+ of 12 tokens and leave no room"):
        encode(shown(), rows, max_length=12)


def test_long_examples_are_not_shown() -> None:
    columns = encode(shown(longest_example=7), ROWS[:1], references=True)
    # "that red cat is clever" takes 8 tokens with its template
    assert {text for sequence, _ in sequences(columns, 0) for text in sequence.split(" [SEP]")[2:3]} == {
        " the fish is brave this is good"
    }
    with pytest.raises(DataError, match=r"label word 'bad' has 0 shot\(s\), none but the text; wanted: another"):
        encode(shown(longest_example=6), ROWS[:1])


def test_a_mask_in_the_text_is_not_the_mask() -> None:
    columns = encode(get_task("toy_sentiment+prompt"), [{"text": "the [MASK] is good [SEP]", "label": 1}])
    assert words(columns["input_ids"][0]) == "[CLS] the [MASK] is good [SEP] this is [MASK] [SEP]"
    assert columns["token_mask"][0] == [0] * 8 + [1, 0]


def test_examples_of_numbers_show_the_word_of_the_nearer_bound() -> None:
    shots = [{"sentence1": f"the {a}", "sentence2": "the dog", "label": s} for a, s in (("cat", 0.5), ("fish", 3.5))]
    task = prompted(get_task("toy_similarity"), "prompt-demo", shots=shots)
    columns = encode(task, [{"sentence1": "red", "sentence2": "grey", "label": 1.0}])
    expected = "[CLS] red [MASK] grey [SEP] the cat tiny the dog [SEP] the fish huge the dog [SEP]"
    assert sequences(columns, 0) == [(expected, 2)]


@pytest.mark.parametrize("shots", [(), "rows", [1]])
def test_demonstrations_need_shots(shots: Any) -> None:
    with pytest.raises(
        UsageError, match=r"task.options.shots is .*; allowed with demonstrations: rows to show, which F"
    ):
        encode(shown(shots=shots), ROWS)


# -- what is computed


@pytest.mark.parametrize("several", [False, True])
def test_outputs_are_the_mean_over_sets_of_the_scores_at_the_mask(several: bool) -> None:
    task = shown() if several else get_task("toy_sentiment+prompt")
    kind = build_kind(task)
    columns = encode(task, ROWS, references=True)
    inputs = batch_of_lists(columns, pad_token_id=0)["inputs"]
    scores = torch.randn(*inputs["input_ids"].shape, 2, dtype=torch.float64)
    found = kind.outputs(scores, inputs)
    sequence = 0
    for row in range(5):
        count = len(columns["sizes"][row]) if several else 1
        parts = []
        for _ in range(count):
            place = inputs["input_ids"][sequence].tolist().index(TOKENIZER.mask_token_id)
            parts.append(scores[sequence, place])
            sequence += 1
        assert_close(found[row], torch.stack(parts).mean(0))
    assert sequence == len(scores)


def test_losses_are_those_of_a_classification() -> None:
    task = get_task("toy_sentiment+prompt")
    outputs, batch = torch.randn(4, 2), {"labels": torch.tensor([0, 1, 1, 0])}
    for weights in (None, torch.tensor([1.0, 3.0])):
        plain = build_kind(get_task("toy_sentiment")).losses(outputs, batch, weights)
        assert_close(build_kind(task).losses(outputs, batch, weights), plain)


def test_losses_of_numbers_are_the_cross_entropy_of_mixtures() -> None:
    outputs, labels = torch.randn(3, 2), [0.0, 1.0, 4.0]
    losses, weights = build_kind(SCORE).losses(outputs, {"labels": torch.tensor(labels)}, None)
    for row, label, loss in zip(outputs.tolist(), labels, losses.tolist(), strict=True):
        total = math.log(math.exp(row[0]) + math.exp(row[1]))
        share = label / 4
        assert loss == pytest.approx(-(1 - share) * (row[0] - total) - share * (row[1] - total), rel=1e-5)
    assert weights.tolist() == [1.0] * 3
    with pytest.raises(UsageError, match="class_weights is set; allowed for kind prompt with bounds: null"):
        build_kind(SCORE).losses(outputs, {"labels": torch.tensor(labels)}, torch.ones(2))


def test_numbers_are_mixtures_of_the_bounds() -> None:
    kind = build_kind(SCORE)
    outputs = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [50.0, 0.0]])
    assert_close(kind.predictions(outputs, {}, MODEL), torch.tensor([2.0, 3.0, 0.0]))
    assert [answer["score"] for answer in kind.answers(outputs, {}, MODEL)] == pytest.approx([2.0, 3.0, 0.0])
    assert_close(kind.constant(torch.tensor([1.0, 2.0, 6.0])), torch.tensor(3.0))
    assert kind.classes() == () and kind.num_outputs == 2


def test_answers_have_names() -> None:
    task = prompted(Task(name="mine", labels=("a", "b")), template="{0} {mask}", words=["bad", "good"], id="id")
    columns = encode(task, [{"text": "cat", "label": "b", "id": "x7"}], references=True)
    batch = batch_of_lists(columns, pad_token_id=0)
    (answer,) = build_kind(task).answers(torch.tensor([[0.0, math.log(3.0)]]), batch, MODEL)
    assert answer == {"id": "x7", "label": "b", "probabilities": {"a": pytest.approx(0.25), "b": pytest.approx(0.75)}}


def test_scores_outside_of_the_bounds() -> None:
    for value in (-0.1, 4.1):
        with pytest.raises(DataError, match=f"row 0, column 'label': the label is {value}; allowed: 0.0 to 4.0"):
            encode(SCORE, [{"sentence1": "a", "sentence2": "b", "label": value}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": {"negative": "bad"}}, "task.options.words is .*; allowed: a text for each of negative, positive"),
        ({"words": ["bad"]}, "task.options.words is .*; allowed: a text for each of negative, positive"),
        ({"words": "ab"}, "task.options.words is 'ab'; allowed"),
        ({"words": ["bad", " "]}, "task.options.words is .*; allowed"),
        ({"template": ""}, r"task.options.template is ''; allowed: \{0\}, \{mask\}, each once"),
        ({"words": {"negative": False, "positive": True}}, r"task.options.words is \[False, True\]; allowed"),
        ({"demonstrate": "all"}, "task.options.demonstrate is 'all'; allowed: none, random, similar"),
        ({"sets": 0}, "task.options.sets is 0; allowed: a whole number, at least 1"),
        ({"sets": True}, "task.options.sets is True; allowed: a whole number, at least 1"),
        ({"longest_example": -1}, "task.options.longest_example is -1; allowed: a whole number, at least 0"),
        ({"id": 3}, "task.options.id is 3; allowed: the name of a column"),
        ({"bounds": [1, 1]}, r"task.options.bounds is \[1, 1\]; allowed: two numbers, the lower one first"),
        ({"bounds": "05"}, "task.options.bounds is '05'; allowed: two numbers"),
        ({"bounds": [0, 5]}, r"task.labels is \['negative', 'positive'\]; allowed for kind regress: none"),
        ({"stride": 1}, "task.options has 'stride'; allowed for kind prompt: template, words"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(prompted(get_task("toy_sentiment"), **options))


# -- with shots, and whole


def test_the_shots_are_the_examples(cache_dir: Any) -> None:
    data = FewShotDataModule("toy_sentiment+prompt-demo", shots=3, tokenizer="toy", test_rows=4, batch_size=4)
    batches: dict[int, torch.Tensor] = {}
    for seed in (13, 21, 13):
        data.choose(seed)
        data.setup("fit")
        data.setup("test")
        assert isinstance(data.kind, Prompt) and data.task.options["shots"] == data.kind.settings["shots"]
        rows: Any = data.source("train").read()
        assert data.task.options["shots"] == rows
        texts = {f"{row['text']} this is {('bad', 'good')[row['label']]}" for row in rows}
        for batch in (*data.loader("train"), *data.loader("validation"), *data.loader("test")):
            for tokens in batch["inputs"]["input_ids"]:
                query, *examples = words([n for n in tokens.tolist() if n]).removesuffix(" [SEP]").split(" [SEP] ")
                assert len(examples) == 2 and set(examples) <= texts
                assert query.removeprefix("[CLS] ").removesuffix(" this is [MASK]") + " this is bad" not in examples
        found = next(iter(data.loader("test")))["inputs"]["input_ids"]
        assert seed not in batches or torch.equal(batches[seed], found)
        batches[seed] = found
    assert not torch.equal(batches[13], batches[21])


def test_a_run_keeps_the_shots_that_it_was_shown(tmp_path: Path, cache_dir: Any) -> None:
    data = FewShotDataModule("toy_sentiment+prompt-demo", shots=3, test_rows=5)
    module = build(FineTuneModule, task="toy_sentiment+prompt-demo")
    trainer(tmp_path, max_steps=2).fit(module, data)
    loaded = load(tmp_path / "last.ckpt")
    assert loaded.task.options["shots"] == data.source("train").read()
    assert loaded.predict(["the cat looks good"]) == module.predict(["the cat looks good"])


def test_a_module_made_with_the_shots_answers_texts(cache_dir: Any) -> None:
    data = FewShotDataModule("toy_sentiment+prompt-demo", shots=3, tokenizer="toy", test_rows=5)
    data.setup("test")
    module = build(FineTuneModule, task=data.task)
    answers = trainer().predict(module, dataloaders=data.test_dataloader())
    rows: Any = data.source("test").read()
    alone = module.predict([row["text"] for row in rows])
    written = sorted((answer for batch in answers or [] for answer in batch), key=lambda answer: answer["row"])
    assert [answer["label"] for answer in written] == [answer["label"] for answer in alone]
    for one, other in zip(written, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    with pytest.raises(UsageError, match=r"task.options.shots is .*allowed with demonstrations"):
        build(FineTuneModule, task="toy_sentiment+prompt-demo").predict(["the cat"])


def test_the_head_is_not_trained(cache_dir: Any) -> None:
    data = FewShotDataModule("toy_sentiment+prompt", shots=8, tokenizer="toy", batch_size=8)
    module = build(FineTuneModule, task="toy_sentiment+prompt")
    module.configure_model()
    before = {name: buffer.clone() for name, buffer in module.head.named_buffers()}
    weight = module.backbone.get_parameter("embeddings.word_embeddings.weight").clone()
    trainer(max_steps=2, limit_val_batches=0).fit(module, data)
    assert_close(dict(module.head.named_buffers()), before, rtol=0, atol=0)
    assert not torch.equal(weight, module.backbone.get_parameter("embeddings.word_embeddings.weight"))
    assert module.summary()["head_parameters"] == 0
