"""Multiple choice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import FineTuneModule
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.data.source import open_source
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.kinds.choice import Choice
from peft_lightning.tasks.table import Task, get_task
from tests.toy import build, data, tiny, trainer

MODEL: Any = None  # this kind asks nothing of it
ANIMALS = ["the cat", "the dog", "the horse", "the fish"]


def task(**fields: Any) -> Task:
    """A task of one text and one column of choices, but for ``fields``."""
    options = {"choices": ["choices"]} | fields.pop("options", {})
    return Task(**{"kind": "choice", "text": ("question",), "options": options, **fields})


def encode(task: Task, rows: dict[str, Any], **options: Any) -> dict[str, list[Any]]:
    settings: dict[str, Any] = {"max_length": 32, "labelled": True, **options}
    columns: Any = build_kind(task).encode(rows, toy_tokenizer(), **settings)
    return columns


def texts_of(columns: dict[str, list[Any]]) -> list[list[str]]:
    """The sequences of each row, decoded."""
    texts = []
    for tokens, sizes in zip(columns["input_ids"], columns["sizes"], strict=True):
        parts = torch.tensor(tokens).split(sizes)
        texts.append([toy_tokenizer().decode(part.tolist()) for part in parts])
    return texts


def rows(*choices: Any, labels: Any = None) -> dict[str, Any]:
    return {"question": ["this cat"] * len(choices), "choices": list(choices), "label": labels or [0] * len(choices)}


# -- encoding


def test_each_choice_is_a_pair_with_the_context() -> None:
    columns = encode(task(), rows(ANIMALS[:2], ANIMALS[:3], labels=[1, 2]), references=True)
    assert texts_of(columns) == [
        ["[CLS] this cat [SEP] the cat [SEP]", "[CLS] this cat [SEP] the dog [SEP]"],
        [f"[CLS] this cat [SEP] {animal} [SEP]" for animal in ANIMALS[:3]],
    ]
    assert columns["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1] * 2
    assert columns["labels"] == [1, 2]
    assert [json.loads(text) for text in columns["reference"]] == [{"choices": ANIMALS[:2]}, {"choices": ANIMALS[:3]}]
    assert "reference" not in encode(task(), rows(ANIMALS)) and "labels" not in encode(
        task(), rows(ANIMALS), labelled=False
    )


def test_columns_with_one_choice_each() -> None:
    several = task(options={"choices": ["a", "b", "c"], "id": "idx"})
    content = {"question": ["this cat"] * 2, "a": ANIMALS[:2], "b": ANIMALS[2:], "c": [None, "cat"], "idx": [7, 8]}
    columns = encode(several, content, labelled=False, references=True)
    assert [len(sizes) for sizes in columns["sizes"]] == [2, 3]
    assert json.loads(columns["reference"][1]) == {"choices": ["the dog", "the fish", "cat"], "id": 8}
    assert build_kind(several).columns(True) == ("question", "a", "b", "c", "idx", "label")
    with pytest.raises(DataError, match=r"row 0, columns a, b, c: \('the cat', None, 'x'\) is not a list of texts"):
        encode(several, {**content, "b": [None, ""], "c": ["x", "y"]}, labelled=False)


@pytest.mark.parametrize(
    ("choices", "label"),
    [
        ({"text": ANIMALS[:3], "label": ["A", "B", "C"]}, "C"),
        ({"text": ANIMALS[:3], "label": ["1", "2", "3"]}, "3"),
        ([{"text": text, "label": name} for text, name in zip(ANIMALS[:3], "ABC", strict=True)], "C"),
        (ANIMALS[:3], "C"),
        (ANIMALS[:3], "2"),
        (ANIMALS[:3], 2),
    ],
)
def test_forms_of_choices_and_labels(choices: Any, label: Any) -> None:
    """As the hub has them, and as plain files do."""
    columns = encode(task(), rows(ANIMALS[:2], choices, labels=[0, label]))
    assert columns["labels"] == [0, 2] and texts_of(columns)[1][2] == "[CLS] this cat [SEP] the horse [SEP]"


def test_names_of_choices_are_texts_and_numbers_count_from_0() -> None:
    winogrande = task(options={"names": ["1", "2"]})
    assert encode(winogrande, rows(*[ANIMALS[:2]] * 4, labels=["1", "2", 0, 1]))["labels"] == [0, 1, 0, 1]
    assert build_kind(winogrande).target("2") == 1
    with pytest.raises(DataError, match=r"row 5, column 'label': the label is '0'; allowed: a number from 0 on, or 1"):
        encode(winogrande, rows(ANIMALS[:2], labels=["0"]), first_row=5)


@pytest.mark.parametrize("label", [None, -1, "", "a", "AB", 1.0, True, "-1", ["A"]])
def test_labels_that_are_none(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 0, column 'label': the label is .*; allowed: a number from 0 on, or a l"):
        encode(task(), rows(ANIMALS, labels=[label]))


@pytest.mark.parametrize("label", [2, "C", "2"])
def test_label_out_of_the_rows_range(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 4, column 'label': the label is .*; allowed for 2 choices"):
        encode(task(), rows(ANIMALS, ANIMALS[:2], labels=[3, label]), first_row=3)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], r"row 3 has 0 choice\(s\); allowed: two or more"),
        (["cat"], r"row 3 has 1 choice\(s\); allowed: two or more"),
        (None, r"row 3, column 'choices': None is not a list of texts"),
        ("cat", r"row 3, column 'choices': 'cat' is not a list of texts"),
        (["cat", None], r"row 3, column 'choices': .* is not a list of texts"),
        ({"texts": ["a", "b"]}, r"row 3, column 'choices': None is not a list of texts"),
        ({"text": ["a", "b"], "label": ["A"]}, r"row 3 has 2 choices with 1 labels; allowed: as many"),
    ],
)
def test_choices_that_are_none(choices: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(task(), rows(ANIMALS, choices), first_row=2)


def test_last_columns_may_be_empty_as_in_csv() -> None:
    given = task(options={"choices": ["a", "b", "c"]})
    content = {"question": ["this"] * 2, "a": ["cat", "cat"], "b": ["dog", "dog"], "c": ["", "fish"], "label": [1, 2]}
    assert [len(row) for row in encode(given, content)["sizes"]] == [2, 3]


def test_names_of_choices_are_different_lists_of_texts() -> None:
    for names in (["A", "A"], 5, "AB"):
        said = r"row 0 has (choices labelled A, A; allowed: different|2 choices with (5|'AB'))"
        with pytest.raises(DataError, match=said):
            encode(task(), rows({"text": ["cat", "dog"], "label": names}, labels=["A"]), labelled=False)


def test_blank_is_filled_with_each_choice() -> None:
    cloze = task(options={"blank": "_"})
    content = {"question": ["the cat sees _ is good .", "_ runs"], "choices": [ANIMALS[1:3], ANIMALS[:2]]}
    columns = encode(cloze, content, labelled=False, references=True)
    assert texts_of(columns) == [
        [f"[CLS] the cat [UNK] [SEP] {animal} is good [UNK] [SEP]" for animal in ("the dog", "the horse")],
        [f"[CLS] [SEP] {animal} runs [SEP]" for animal in ("the cat", "the dog")],
    ]
    assert json.loads(columns["reference"][0]) == {"choices": ANIMALS[1:3]}
    for text, times in (("the cat", 0), ("_ or _", 2)):
        with pytest.raises(DataError, match=f"row 9, column 'question': has '_' {times} times; allowed: once"):
            encode(cloze, {"question": [text], "choices": [ANIMALS]}, labelled=False, first_row=9)


def test_words_instead_of_values() -> None:
    fields = {"text": ("question", "asks"), "options": {"words": {"asks": {"cause": "is bad", "effect": "is good"}}}}
    content = {**rows(ANIMALS[:2], ANIMALS[:2]), "asks": ["cause", "effect"]}
    assert [row[1] for row in texts_of(encode(task(**fields), content))] == [
        "[CLS] this cat is bad [SEP] the dog [SEP]",
        "[CLS] this cat is good [SEP] the dog [SEP]",
    ]
    with pytest.raises(DataError, match=r"row 1, column 'asks': 'why'; allowed: cause, effect"):
        encode(task(**fields), {**content, "asks": ["cause", "why"]})


def test_a_long_pair_loses_its_context_first() -> None:
    content = {"question": ["this red cat sleeps"], "choices": [["the dog", "the dog is not good"]], "label": [0]}
    assert texts_of(encode(task(), content, max_length=9)) == [
        ["[CLS] this red cat sleeps [SEP] the dog [SEP]", "[CLS] this [SEP] the dog is not good [SEP]"]
    ]
    assert texts_of(encode(task(), content, max_length=7))[0][1] == "[CLS] [SEP] the dog is not [SEP]"


def test_hub_rows_of_the_table() -> None:
    """One row each as the hub has it."""
    listed = {"text": ["cat", "dog"], "label": ["A", "B"]}
    forms: dict[str, tuple[dict[str, Any], int]] = {
        "copa": ({"premise": "p", "question": "effect", "choice1": "a", "choice2": "b", "label": 1}, 1),
        "winogrande": ({"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"}, 1),
        "commonsense_qa": ({"question": "q", "choices": listed, "answerKey": "B", "id": "i"}, 1),
        "social_iqa": (
            {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
            2,
        ),
        "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, 1),
        "hellaswag": ({"ctx": "c", "endings": ["a", "b", "c", "d"], "label": "3"}, 3),
        "arc_easy": ({"question": "q", "choices": listed, "answerKey": "B", "id": "i"}, 1),
        "openbookqa": ({"question_stem": "q", "choices": listed, "answerKey": "B", "id": "i"}, 1),
    }
    for name, (row, label) in forms.items():
        chosen = get_task(name)
        source = open_source(chosen, "train", {"train": [row]}, None)
        columns = next(source.slices(build_kind(chosen).columns(True), 1, chosen.also))
        assert encode(chosen, columns)["labels"] == [label], name


# -- options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("a", "b")}, r"task.labels is \['a', 'b'\]; allowed for kind choice: none"),
        ({"options": {"choices": []}}, r"task.options.choices is \[\]; allowed: a list of 1 or more different names"),
        ({"options": {"choices": "choices"}}, r"task.options.choices is 'choices'; allowed: a list"),
        ({"options": {"names": [1, 2]}}, r"task.options.names is \[1, 2\]; allowed: a list of different names"),
        ({"options": {"words": {"label": {}}}}, r"task.options.words is .*; allowed: question: a mapping of values"),
        ({"options": {"words": {"question": {"a": 1}}}}, r"task.options.words is .*; allowed: question: a mapping"),
        ({"options": {"blank": None}}, r"task.options.blank is None; allowed: a text"),
        ({"options": {"separator": " "}}, r"task.options has 'separator'; allowed for kind choice: choices, blank"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_kind(task(**fields))


def test_wrong_metric() -> None:
    with pytest.raises(UsageError, match="task.metrics has 'f1'; allowed for kind choice: accuracy"):
        build_kind(task(metrics=("f1",))).metrics()


# -- outputs, losses, predictions


def batch_of(*counts: int, labels: list[int]) -> dict[str, Any]:
    choices = [ANIMALS[:count] for count in counts]
    columns = encode(task(), rows(*choices, labels=labels), references=True)
    return batch_of_lists(columns, pad_token_id=0)


def test_scores_are_arranged_by_row_and_their_gradients_come_back() -> None:
    kind, batch = build_kind(task()), batch_of(2, 4, 3, labels=[1, 3, 0])
    scores = torch.arange(9.0, dtype=torch.bfloat16)[:, None].requires_grad_()
    outputs = kind.outputs(scores, batch["inputs"])
    minus = -torch.inf
    assert_close(outputs.detach(), torch.tensor([[0, 1, minus, minus], [2, 3, 4, 5], [6, 7, 8, minus]]))
    assert outputs.dtype == torch.float32
    losses, weights = kind.losses(outputs, batch, None)
    expected = [
        torch.tensor([0.0, 1.0]).logsumexp(0) - 1,
        torch.tensor([2.0, 3, 4, 5]).logsumexp(0) - 5,
        torch.tensor([6.0, 7, 8]).logsumexp(0) - 6,
    ]
    assert_close((losses.detach(), weights), (torch.stack(expected), torch.ones(3)))
    losses.sum().backward()
    assert scores.grad is not None and torch.isfinite(scores.grad).all() and (scores.grad != 0).all()
    assert_close(kind.predictions(outputs, batch, MODEL), torch.tensor([1, 3, 2]))


def test_answers() -> None:
    kind, batch = build_kind(task()), batch_of(2, 3, labels=[0, 0])
    outputs = kind.outputs(torch.tensor([[0.0], [1.0], [3.0], [1.0], [1.0]]), batch["inputs"])
    first, second = kind.answers(outputs, batch, MODEL)
    assert first["label"] == 1 and first["choice"] == "the dog" and set(first) == {"label", "choice", "probabilities"}
    assert first["probabilities"] == pytest.approx([0.268941, 0.731059], abs=1e-5)
    assert second["choice"] == "the cat" and sum(second["probabilities"]) == pytest.approx(1.0)
    assert kind.answers(outputs, batch, MODEL) == [first, second]


def test_no_class_weights() -> None:
    with pytest.raises(UsageError, match="class_weights is set; allowed for kind choice: null"):
        build_kind(task()).losses(torch.zeros(1, 2), {"labels": torch.zeros(1).long()}, torch.ones(2))


def test_trivial_answer_is_the_most_frequent_place() -> None:
    assert_close(build_kind(task()).constant(torch.tensor([2, 0, 2, 1])), torch.tensor(2))


# -- whole


def test_toy_task_is_learned_and_answered() -> None:
    module = build(FineTuneModule, task="toy_choice", dropout=0.0, backbone=tiny(0.0))
    fit = trainer(max_epochs=8, limit_val_batches=0)
    fit.fit(module, datamodule=data(batch_size=32, task="toy_choice"))
    assert fit.test(module, datamodule=data(task="toy_choice"), verbose=False)[0]["test/accuracy"] >= 0.95
    row = {"question": "the red dog", "choices": ["the cat runs", "that dog eats", "this fish plays"]}
    assert module.predict([row])[0]["choice"] == "that dog eats"


def test_kind_is_found_by_name() -> None:
    assert type(build_kind(get_task("copa"))) is Choice
