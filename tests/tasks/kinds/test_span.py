"""Extractive questions, from rows to scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peft_lightning import TaskDataModule
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError
from peft_lightning.methods import FineTuneModule
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task, get_task
from tests.reference import squad as oracle
from tests.tasks.test_spans import make
from tests.toy import build, tiny, trainer

MODEL: Any = None  # this kind asks nothing of it
SHORT = {"window": 12, "stride": 2, "max_question": 2, "max_answer": 3}
CONTEXT = "the red cat runs this black dog sleeps that white fish is not good"
ROWS: list[dict[str, Any]] = [
    {"question": "  dog", "context": CONTEXT, "answers": {"text": ["black dog", "dog"], "answer_start": [22, 28]}},
    {"question": "cat", "context": "The Red Cat", "answers": {"text": ["Red"], "answer_start": [4]}},
    {"question": "cat", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]


def task(rows: int = 3, **options: Any) -> Task:
    """The toy's settings; the third row needs ``unanswerable``."""
    fields: dict[str, Any] = {"text": ("question", "context"), "label": "answers", "metrics": ("f1", "exact_match")}
    return Task(kind="span", **fields, options={**SHORT, "unanswerable": rows > 2, **options})


def encode(rows: list[dict[str, Any]], given: Task, **options: Any) -> dict[str, Any]:
    """The rows with the toy tokenizer."""
    columns = {name: [row[name] for row in rows] for name in build_kind(given).columns(True) if name in rows[0]}
    settings: dict[str, Any] = {"max_length": 64, "labelled": True, "references": True, **options}
    return build_kind(given).encode(columns, toy_tokenizer(), **settings)


def batch_of(rows: list[dict[str, Any]], given: Task, **options: Any) -> dict[str, Any]:
    """The rows as a batch."""
    return batch_of_lists(encode(rows, given, **options), pad_token_id=0)


def windows_of(batch: dict[str, Any]) -> Iterator[tuple[int, int, list[int], tuple[int, int]]]:
    """Row, window in the batch, [null, first, end] and label of every window."""
    number = 0
    for row, count in enumerate(batch["inputs"]["sequences"].tolist()):
        for place in range(count):
            marks = batch["inputs"]["windows"][row, 3 * place : 3 * place + 3].tolist()
            yield row, number, marks, tuple(batch["labels"][row, 2 * place : 2 * place + 2].tolist())
            number += 1


def perfect(batch: dict[str, Any], large: float = 10.0) -> Tensor:
    """Outputs that are large at the labels only."""
    outputs = torch.zeros(*batch["inputs"]["input_ids"].shape, 2)
    for _, number, _, (start, end) in windows_of(batch):
        outputs[number, start, 0] = outputs[number, end, 1] = large
    return outputs


# -- settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text": ("context",)},
            r"task.text is \['context'\]; allowed for kind span: two, the question and the context",
        ),
        ({"labels": ("a", "b")}, r"task.labels is \['a', 'b'\]; allowed for kind span: none"),
        ({"options": {"stride": -1}}, r"task.options.stride is -1; allowed: a whole number, 0 or more"),
        ({"options": {"max_answer": 0}}, r"task.options.max_answer is 0; allowed: a whole number, 1 or more"),
        ({"options": {"best": 2.0}}, r"task.options.best is 2.0; allowed: a whole number, 1 or more"),
        ({"options": {"unanswerable": 1}}, r"task.options.unanswerable is 1; allowed: true or false"),
        ({"options": {"null_threshold": math.nan}}, r"task.options.null_threshold is nan; allowed: a finite number"),
        ({"options": {"id": 3}}, r"task.options.id is 3; allowed: the name of a column, or nothing"),
        ({"options": {"n_best": 3}}, r"task.options has 'n_best'; allowed for kind span: unanswerable, null_threshold"),
        ({"metrics": ("f1", "accuracy")}, r"task.metrics has 'accuracy'; allowed for questions that have an answer"),
    ],
)
def test_settings_that_are_not_allowed(fields: dict[str, Any], message: str) -> None:
    common: dict[str, Any] = {"kind": "span", "text": ("question", "context"), "metrics": ("f1",)}
    with pytest.raises(UsageError, match=message):
        build_kind(Task(**{**common, **fields})).metrics()


def test_the_stride_must_leave_room() -> None:
    for stride, window, most in ((7, 12, "at most 6"), (1, 6, "at most 0")):
        given = task(stride=stride, window=window)
        message = rf"task.options.stride is {stride}; allowed for windows of {window} tokens, 3 special .*: {most}"
        with pytest.raises(UsageError, match=message):
            encode(ROWS, given)
    assert encode(ROWS, task(stride=6)) and encode(ROWS, task(stride=0, window=6))
    with pytest.raises(UsageError, match=r"for windows of 8 tokens, 3 special ones and max_question = 2 among them"):
        encode(ROWS, task(stride=3), max_length=8)


def test_without_a_stride_windows_share_half_of_a_short_one() -> None:
    def ids(rows: list[dict[str, Any]], length: int, **options: Any) -> list[list[int]]:
        return [list(row) for row in encode(rows, task(**options), max_length=length)["input_ids"]]

    # seven tokens of a window are the context's
    assert ids(ROWS, 64, stride=None) == ids(ROWS, 64, stride=3) != ids(ROWS, 64, stride=2)
    long = [{**ROWS[0], "context": " ".join(["dog"] * 700), "answers": {"text": ["dog"], "answer_start": [0]}}]
    assert ids(long, 384, stride=None, window=0) == ids(long, 384, stride=128, window=0)
    with pytest.raises(UsageError, match=r"max_question is 2; .* windows of 5 tokens, 3 special .* at most 1, or"):
        encode(ROWS, task(stride=None, window=5))


# -- encoding


def test_a_row_is_all_windows_of_its_question() -> None:
    columns = encode(ROWS, task())
    tokenizer = toy_tokenizer()
    words = CONTEXT.split()
    # 12 tokens less three special ones and the question leave 8; two of them are shared
    windows = [words[:8], words[6:14]]
    expected = [["[CLS]", "dog", "[SEP]", *window, "[SEP]"] for window in windows]
    assert tokenizer.convert_ids_to_tokens(columns["input_ids"][0]) == sum(expected, [])
    assert columns["token_type_ids"][0].tolist() == ([0] * 3 + [1] * 9) * 2
    assert [sizes.tolist() for sizes in columns["sizes"]] == [[12, 12], [7], [12, 12]]
    assert [labels.tolist() for labels in columns["labels"]] == [[8, 9, 0, 0], [4, 4], [0, 0, 0, 0]]
    assert columns["windows"][1].tolist() == [0, 3, 6]
    assert columns["token_starts"][1].tolist() == [-1, -1, -1, 0, 4, 8, -1]
    assert columns["token_ends"][1].tolist() == [-1, -1, -1, 3, 7, 11, -1]
    assert [json.loads(text) for text in columns["reference"]] == [
        {"context": row["context"], "answers": row["answers"]["text"]} for row in ROWS
    ]


def test_training_and_prediction_need_less() -> None:
    common = {"input_ids", "token_type_ids", "sizes", "windows"}
    assert set(encode(ROWS, task(), references=False)) == {*common, "labels"}
    named = [{**row, "name": f"q{number}"} for number, row in enumerate(ROWS)]
    columns = encode(named, task(id="name"), labelled=False)
    assert set(columns) == {*common, "token_starts", "token_ends", "reference"}
    assert json.loads(columns["reference"][1]) == {"context": "The Red Cat", "id": "q1"}
    assert build_kind(task(id="name")).columns(labelled=False) == ("question", "context", "name")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["dog"], "answer_start": [27]}, r"the answer 'dog' is not at 27 in the context; allowed: the place"),
        ({"text": ["red", "dog"], "answer_start": [4, 900]}, r"the answer 'dog' is not at 900 in the context"),
        (
            {"text": ["dog"], "answer_start": [-1]},
            r"the answers are .*; allowed: {\"text\": \[texts\], \"answer_start\"",
        ),
        ({"text": ["dog"], "answer_start": []}, r"the answers are .*; allowed: {\"text\""),
        ({"text": [" "], "answer_start": [3]}, r"the answers are .*; allowed: {\"text\""),
        ({"text": "dog", "answer_start": 28}, r"the answers are .*; allowed: {\"text\""),
        (["dog"], r"the answers are \['dog'\]; allowed: {\"text\""),
        (None, r"the answers are None; allowed: {\"text\""),
        ({"text": [], "answer_start": []}, r"there is no answer; allowed: at least one, or task.options.unanswerable"),
    ],
)
def test_answers_that_are_not_allowed_name_the_row(answers: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"row 8, column 'answers': {message}"):
        encode([ROWS[1], {**ROWS[0], "answers": answers}], task(2), first_row=7)


def test_spaces_before_a_question_are_no_tokens() -> None:
    rows = {"question": ["dog", " \n dog"], "context": ["the cat"] * 2}
    columns = build_kind(task(2)).encode(rows, make("roberta"), 12, labelled=False)
    assert columns["input_ids"][0].tolist() == columns["input_ids"][1].tolist()


def test_spaces_round_an_answer_belong_to_no_label() -> None:
    row = {
        "question": "cat",
        "context": "the cat     dog   is",
        "answers": {"text": ["     dog "], "answer_start": [7]},
    }
    assert encode([row], task(2))["labels"][0].tolist() == [5, 5]


# -- losses


def test_loss_is_the_mean_over_windows() -> None:
    batch = batch_of(ROWS, task())
    outputs = torch.randn(5, 12, 2, dtype=torch.bfloat16)
    losses, weights = build_kind(task()).losses(outputs, batch, None)
    assert losses.dtype == weights.dtype == torch.float32
    expected = [0.0, 0.0, 0.0]
    for row, number, (null, first, end), label in windows_of(batch):
        for side in (0, 1):
            scores = outputs[number, :, side].float().tolist()
            total = sum(math.exp(scores[place]) for place in (null, *range(first, end)))
            expected[row] += (math.log(total) - scores[label[side]]) / 2
    assert_close(losses, torch.tensor(expected))
    assert weights.tolist() == [2, 1, 2]
    with pytest.raises(UsageError, match="class_weights is set; allowed for kind span: null"):
        build_kind(task()).losses(outputs, batch, torch.ones(2))


def test_what_is_outside_gets_no_gradient() -> None:
    batch = batch_of(ROWS, task())
    outputs = torch.randn(5, 12, 2, requires_grad=True)
    build_kind(task()).losses(outputs, batch, None)[0].sum().backward()
    assert outputs.grad is not None
    for _, number, (null, first, end), _ in windows_of(batch):
        reached = [place for place in range(12) if (outputs.grad[number, place] != 0).all()]
        assert reached == [null, *range(first, end)]


def test_rows_alone_have_the_losses_of_a_batch() -> None:
    kind, batch = build_kind(task()), batch_of(ROWS, task())
    outputs = torch.randn(5, 12, 2)
    together = kind.losses(outputs, batch, None)
    for row, part in enumerate((slice(0, 2), slice(2, 3), slice(3, 5))):
        alone = batch_of(ROWS[row : row + 1], task())
        losses = kind.losses(outputs[part, : alone["inputs"]["input_ids"].shape[1]], alone, None)
        assert_close(torch.stack(losses), torch.stack(together)[:, row : row + 1])


# -- predictions


def test_perfect_outputs_give_the_answers() -> None:
    kind, batch = build_kind(task()), batch_of(ROWS, task())
    found = kind.predictions(perfect(batch), batch, MODEL)
    assert found == ["black dog", "Red", ""]
    metrics = kind.metrics()
    metrics.update(found, kind.truths(batch))
    assert metrics.compute() == {"f1": 1.0, "exact_match": 1.0}


def test_predictions_are_the_best_spans_of_all_windows() -> None:
    rows = ROWS[:2] * 8
    given = task(2)
    kind, batch = build_kind(given), batch_of(rows, given)
    outputs = torch.randn(len(batch["inputs"]["input_ids"]), 12, 2)
    found = kind.predictions(outputs, batch, MODEL)
    best: dict[int, tuple[float, str]] = {}
    for row, number, (_, first, end), _ in windows_of(batch):
        starts, ends = outputs[number].T.tolist()
        score, i, j = oracle.spans(starts, ends, [first <= place < end for place in range(12)], 3)[0]
        bounds = batch["inputs"]["token_starts"][number, i], batch["inputs"]["token_ends"][number, j]
        best[row] = max(best.get(row, (-math.inf, "")), (score, rows[row]["context"][slice(*bounds)]))
    assert found == [best[row][1] for row in range(len(rows))]
    assert len(set(found)) > 5


def test_no_answer_where_its_least_score_is_larger() -> None:
    batch = batch_of(ROWS[:1], task())
    outputs = torch.zeros(2, 12, 2)
    outputs[:, 0] = torch.tensor([[3.0, 2.0], [9.0, 9.0]])  # 5 and 18: the least counts
    outputs[0, 8, 0], outputs[0, 9, 1] = 2.0, 2.0
    for threshold, text in ((0.0, ""), (0.5, ""), (1.0, "black dog"), (1.5, "black dog")):
        kind = build_kind(task(null_threshold=threshold))
        answer = kind.answers(outputs, batch, MODEL)[0]
        assert kind.predictions(outputs, batch, MODEL) == [answer["answer"]] == [text]
        assert answer["score"] == 4.0 and answer["no_answer_score"] == 5.0
        assert (answer["start"], answer["end"]) == ((22, 31) if text else (None, None))
    assert build_kind(task(2)).predictions(outputs, batch, MODEL) == ["black dog"]


def test_answers_hold_what_people_need() -> None:
    rows = [{**row, "id": f"q{number}"} for number, row in enumerate(ROWS[:2])]
    given = task(2, id="id", best=2)
    batch = batch_of(rows, given, labelled=False)
    outputs = torch.zeros(3, 12, 2)
    outputs[0, 9], outputs[0, 8, 0], outputs[2, 4] = 4.0, 3.0, 9.0
    kind = build_kind(given)
    answers = kind.answers(outputs, batch, MODEL)
    assert [(a["id"], a["answer"], a["start"], a["end"], a["score"]) for a in answers] == [
        ("q0", "dog", 28, 31, 8.0),
        ("q1", "Red", 4, 7, 18.0),
    ]
    assert all(CONTEXT[a["start"] : a["end"]] == a["answer"] for a in answers[:1])
    assert answers[0]["probability"] == pytest.approx(1 / (1 + math.exp(-1)))  # "black dog" is one less
    assert "no_answer_score" not in answers[0]
    assert json.loads(json.dumps(answers)) == answers
    assert {name: json.loads(text) for name, text in kind.official(answers).items()} == {
        "predictions.json": {"q0": "dog", "q1": "Red"}
    }


def test_a_span_in_two_windows_counts_once() -> None:
    given = task(2)
    batch = batch_of(ROWS[:1], given)
    outputs = torch.full((2, 12, 2), -50.0)
    outputs[0, 9:11], outputs[1, 3:5] = 1.0, 1.0  # "dog" and "sleeps", in both
    answer = build_kind(given).answers(outputs, batch, MODEL)[0]
    assert answer["probability"] == pytest.approx(1 / 3)  # dog, sleeps, dog sleeps


def test_no_official_file_without_names_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    kind, answer = build_kind(task(rows=2, id="id")), {"answer": "cat"}
    assert kind.official([{**answer, "id": 7}, {**answer, "id": "8"}])
    for names in (["a", "a"], ["a", None], [["a"], ["b"]]):
        caplog.clear()
        assert kind.official([{**answer, "id": name} for name in names]) == {}
        assert "not every question has an id of its own" in caplog.text


def test_official_files_of_version_2() -> None:
    rows = [{**row, "id": f"q{number}"} for number, row in enumerate(ROWS)]
    given = task(id="id")
    batch, kind = batch_of(rows, given), build_kind(given)
    files = kind.official(kind.answers(perfect(batch), batch, MODEL))
    assert json.loads(files["predictions.json"]) == {"q0": "black dog", "q1": "Red", "q2": ""}
    odds = json.loads(files["na_prob.json"])
    assert odds["q2"] > 0.99 and odds["q0"] < 0.01 and odds["q1"] < 0.01
    plain = batch_of(ROWS, task())
    assert build_kind(task()).official(build_kind(task()).answers(perfect(plain), plain, MODEL)) == {}


def test_a_context_without_tokens_has_no_answer() -> None:
    rows = [{"question": "cat", "context": " "}, {"question": "cat", "context": "the cat"}]
    for options in ({}, {"unanswerable": True}):
        given = task(2, **options)
        batch = batch_of(rows, given, labelled=False)
        answers = build_kind(given).answers(torch.zeros(2, 6, 2), batch, MODEL)
        assert answers[0]["answer"] == "" and answers[0]["score"] is None and answers[0]["start"] is None
        assert json.loads(json.dumps(answers, allow_nan=False)) == answers


def test_baseline() -> None:
    context = "Dr. Who lives in 5.5 rooms? Yes"
    references = [{"context": text, "answers": ["gold"]} for text in (context, "no end", "One. Two.")]
    rows: Any = type("Rows", (), {"batches": lambda self, stage: iter([{"references": references}])})()
    truths = [["gold"]] * 3
    assert list(build_kind(task(2)).baseline(rows, "test")) == [(["Dr.", "no end", "One."], truths)]
    assert list(build_kind(task(3)).baseline(rows, "test")) == [([""] * 3, truths)]


# -- with the rest


def wide() -> dict[str, Any]:
    """The encoder of ``configs/overlays/toy.yaml``."""
    backbone = tiny(0.0)
    return {**backbone, "config": {**backbone["config"], "hidden_size": 64, "num_attention_heads": 4}}


def toy_data(**options: Any) -> TaskDataModule:
    """The toy task, or rows."""
    return TaskDataModule(task="toy_span", tokenizer="toy", **options)


def test_toy_rows_ask_for_a_word_of_the_same_kind() -> None:
    rows = toy_rows("toy_span", "train")
    for row in rows:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"].startswith(text, start) and not {*row["question"].split()} & {*text.split()}
    given = get_task("toy_span")
    columns = encode(rows, given)
    assert {len(sizes) for sizes in columns["sizes"]} == {1, 2}
    batch = batch_of(rows[:300], given)
    assert build_kind(given).predictions(perfect(batch), batch, MODEL) == [r["answers"]["text"][0] for r in rows[:300]]


def test_batches_through_the_cache_are_those_of_lists(cache_dir: Path) -> None:
    module = toy_data(batch_size=8)
    module.setup("test")
    batch = next(iter(module.test_dataloader()))
    rows = toy_rows("toy_span", "test")
    plain = batch_of([rows[row] for row in batch["rows"]], get_task("toy_span"))
    assert_close(dict(batch["inputs"]), plain["inputs"])
    assert_close(batch["labels"], plain["labels"])
    assert batch["references"] == plain["references"]


def test_fit_test_and_predict(cache_dir: Path) -> None:
    module = build(FineTuneModule, task="toy_span", dropout=0.0)
    data = toy_data(batch_size=16, eval_batch_size=24)
    fit = trainer(max_steps=2, limit_val_batches=2)
    fit.fit(module, datamodule=data)
    values = fit.test(module, datamodule=data, verbose=False)[0]
    assert set(values) == {"test/loss", "test/f1", "test/exact_match"}
    written = [answer for part in fit.predict(module, datamodule=data) or [] for answer in part]
    rows = toy_rows("toy_span", "test")
    answers = module.predict([(row["question"], row["context"]) for row in rows])
    assert [answer["answer"] for answer in sorted(written, key=lambda a: a["row"])] == [a["answer"] for a in answers]
    expected = oracle.evaluate([a["answer"] for a in answers], [row["answers"]["text"] for row in rows], 1)
    assert {name: values[f"test/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_toy_task_is_learned(cache_dir: Path) -> None:
    module = build(FineTuneModule, task="toy_span", backbone=wide(), dropout=0.0)
    fit = trainer(max_epochs=8, limit_val_batches=0)
    fit.fit(module, datamodule=toy_data(batch_size=32))
    assert fit.test(module, datamodule=toy_data(), verbose=False)[0]["test/exact_match"] >= 0.95


@pytest.mark.parametrize("name", ["squad_v1", "squad_v2"])
def test_perfect_outputs_on_real_questions(name: str, encoder: str, shared_data: Path, cache_dir: Path) -> None:
    data = TaskDataModule(task=name, tokenizer=encoder, root=str(shared_data), max_length=384, batch_size=32)
    data.setup("validate")
    kind, seen, aligned = data.kind, 0, 0
    for batch in data.batches("validation"):
        answers, truths, inputs = kind.predictions(perfect(batch), batch, MODEL), kind.truths(batch), batch["inputs"]
        texts = dict.fromkeys(range(len(truths)), "")  # as far as tokens can say
        for row, number, (null, _, _), (start, end) in windows_of(batch):
            if start != null and end - start < 30:
                bounds = inputs["token_starts"][number, start], inputs["token_ends"][number, end]
                texts[row] = batch["references"][row]["context"][slice(*bounds)]
        for row, golds in enumerate(truths):
            seen += 1
            if texts[row] == (golds[0] if golds else ""):
                aligned += 1
                assert answers[row] == texts[row]
        if seen >= 500:
            break
    assert aligned >= 0.98 * seen
