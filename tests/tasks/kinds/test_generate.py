"""Texts that are written: encoding, loss, search, scores and answers, alone and inside methods."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning import FineTuneModule, TaskDataModule, load
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.callbacks.report import baseline_scores
from peft_lightning.data.toy import toy_rows
from peft_lightning.errors import DataError, UsageError
from peft_lightning.layers.language_head import LanguageHead
from peft_lightning.tasks.batch import batch_of_lists
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.kinds.generate import Generate
from peft_lightning.tasks.table import TASKS, Task
from tests.families import backbone_setting
from tests.reference.generate import greedy, loss, texts
from tests.toy import TASK_METHODS, build, data, trainer

IDS = toy_tokenizer().convert_tokens_to_ids
ROWS: dict[str, Any] = {
    "text": ["the cat runs", "the dog"],
    "label": ["cat runs", ["dog", "the dog"]],
    "more": [["cat", "cat runs"], []],
    "key": ["a", 7],
}
TOY = {"max_target": 10, "beams": 1, "no_repeat_ngram": 0}


def kind_of(**options: Any) -> Generate:
    kind = build_kind(Task(kind="generate", metrics=("rougeL",), options=options))
    assert isinstance(kind, Generate)
    return kind


def encode(kind: Generate, rows: dict[str, Any], **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_length": 16, "labelled": True, "references": True, **options}
    return kind.encode(rows, toy_tokenizer(), **settings)


def batch_of(kind: Generate, rows: dict[str, Any], **options: Any) -> dict[str, Any]:
    return batch_of_lists(encode(kind, rows, **options), pad_token_id=0)


def model(seed: int = 0, **options: Any) -> Any:
    """What a kind may ask of a module, around a tiny random BART."""
    torch.manual_seed(seed)
    setting = backbone_setting("bart")
    setting["config"] |= options
    backbone = build_backbone(BackboneConfig(**setting)).eval()
    return SimpleNamespace(backbone=backbone, head=LanguageHead(backbone), tokenizer_name="toy")


def outputs(kind: Generate, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {n: t for n, t in kind.inputs(batch, model.backbone.config).items() if n != "token_type_ids"}
    logits: torch.Tensor = model.head(model.backbone(**inputs).last_hidden_state)
    return logits


# -- encoding


def test_texts_and_summaries_are_encoded() -> None:
    columns = encode(kind_of(targets="more", id="key"), ROWS)
    assert columns["input_ids"][0] == IDS(["[CLS]", "the", "cat", "runs", "[SEP]"])
    assert columns["labels"] == [IDS(["[CLS]", "cat", "runs", "[SEP]"]), IDS(["[CLS]", "dog", "[SEP]"])]
    assert [json.loads(text) for text in columns["reference"]] == [
        {"id": "a", "summary": ["cat runs", "cat"], "first": "the cat runs"},
        {"id": 7, "summary": ["dog", "the dog"], "first": "the dog"},
    ]


def test_a_long_summary_keeps_its_end() -> None:
    columns = encode(kind_of(max_target=3), ROWS)
    assert columns["labels"] == [IDS(["[CLS]", "cat", "[SEP]"]), IDS(["[CLS]", "dog", "[SEP]"])]
    assert json.loads(columns["reference"][0])["summary"] == ["cat runs"]


def test_sentences_are_joined() -> None:
    rows = {"text": [["the cat runs.", "the dog eats."]], "label": [["cat", "dog"]]}
    columns = encode(kind_of(), rows)
    assert (
        columns["input_ids"]
        == encode(kind_of(), {"text": ["the cat runs. the dog eats."], "label": ["cat"]})["input_ids"]
    )
    assert columns["labels"] == [IDS(["[CLS]", "cat", "[SEP]"])]
    assert json.loads(columns["reference"][0]) == {"summary": ["cat", "dog"], "first": "the cat runs. the dog eats."}


def test_columns_and_what_a_stage_needs() -> None:
    kind = kind_of(targets="more", id="key")
    assert kind.columns(labelled=True) == ("text", "key", "label", "more")
    assert kind.columns(labelled=False) == ("text", "key")
    assert "reference" not in encode(kind, ROWS, references=False)
    unlabelled = encode(kind, {"text": ["cat"], "key": ["b"]}, labelled=False)
    assert set(unlabelled) == {"input_ids", "token_type_ids", "reference"}
    assert unlabelled["reference"] == ['{"id": "b"}']
    assert "reference" not in encode(kind_of(), {"text": ["cat"]}, labelled=False)


@pytest.mark.parametrize("label", [None, 3, [], [None], ["a", 2]])
def test_a_label_that_is_no_summary(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 6, column 'label': .* is no summary; allowed: a text, or a list of one"):
        encode(kind_of(), {"text": ["a", "b"], "label": ["a", label]}, first_row=5)


def test_other_wrong_values() -> None:
    with pytest.raises(DataError, match=r"row 5, column 'text': 3 is not a text"):
        encode(kind_of(), {"text": [3], "label": ["a"]}, first_row=5)
    with pytest.raises(DataError, match=r"row 5, column 'more': 'a' are no references; allowed: a list of texts"):
        encode(kind_of(targets="more"), {"text": ["a"], "label": ["a"], "more": ["a"]}, first_row=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_target": 1}, r"max_target is 1; allowed: a whole number, at least 2"),
        ({"max_target": 8.0}, r"max_target is 8.0; allowed: a whole number"),
        ({"beams": True}, r"beams is True; allowed: a whole number, at least 1"),
        ({"min_target": -1}, r"min_target is -1; allowed: a whole number, at least 0"),
        ({"min_target": 64}, r"min_target is 64; allowed: less than max_target, 64"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; allowed: a number, at least 0.0 and below 1"),
        ({"length_penalty": float("nan")}, r"length_penalty is nan; allowed: a number"),
        ({"id": 3}, r"task.options.id is 3; allowed: the name of a column"),
        ({"beam": 3}, r"task.options has 'beam'; allowed for kind generate: max_target, min_target, beams"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind_of(**options)


def test_classes_heads_and_weights_have_no_place() -> None:
    with pytest.raises(UsageError, match=r"task.labels is \['a', 'b'\]; allowed for kind generate: none"):
        build_kind(Task(kind="generate", labels=("a", "b")))
    with pytest.raises(UsageError, match=r"head is 'dense'; allowed for kind generate: auto"):
        kind_of().head(model().backbone, "dense", 0.1)
    with pytest.raises(UsageError, match=r"class_weights is set; allowed for kind generate: null"):
        kind_of().losses(torch.zeros(1, 1, 2), {"labels": torch.zeros(1, 1).long()}, torch.ones(1))
    with pytest.raises(UsageError, match=r"max_target is 64; allowed with this backbone: at most 32"):
        kind_of().head(model(max_position_embeddings=32).backbone, "tied", 0.1)


# -- what is computed


def test_the_decoder_reads_the_labels_one_token_late() -> None:
    kind, config = kind_of(), model().backbone.config
    batch = batch_of(kind, ROWS)
    inputs = kind.inputs(batch, config)
    start, pad = config.decoder_start_token_id, config.pad_token_id
    cls, cat, runs, dog, end = IDS(["[CLS]", "cat", "runs", "dog", "[SEP]"])
    assert inputs["decoder_input_ids"].tolist() == [[start, cls, cat, runs], [start, cls, dog, end]]
    longer = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 2), value=-100)}
    assert kind.inputs(longer, config)["decoder_input_ids"][1].tolist() == [start, cls, dog, end, pad, pad]
    assert set(inputs) == {*batch["inputs"], "decoder_input_ids"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_sum_over_target_tokens(smoothing: float) -> None:
    kind, there = kind_of(label_smoothing=smoothing), model()
    batch = batch_of(kind, ROWS)
    with torch.no_grad():
        logits = outputs(kind, there, batch)
        losses, weights = kind.losses(logits, batch, None)
        targets = [[token for token in row if token != -100] for row in batch["labels"].tolist()]
        rows = zip(texts(batch["inputs"]), targets, strict=True)
        expected = torch.stack([loss(there.backbone, ids, target, smoothing) for ids, target in rows])
    assert_close(losses, expected.float(), rtol=1e-4, atol=1e-4)
    assert weights.tolist() == [4, 3]
    assert {t.dtype for t in kind.losses(logits.bfloat16(), batch, None)} == {torch.float32}


def test_losses_of_uneven_parts_add_up() -> None:
    kind = kind_of()
    logits, labels = torch.randn(5, 4, 9), torch.randint(0, 9, (5, 4))
    labels[2, 1:] = -100
    whole = kind.losses(logits, {"labels": labels}, None)
    parts = [kind.losses(logits[p], {"labels": labels[p]}, None) for p in (slice(0, 3), slice(3, 5), slice(5, 5))]
    for number in (0, 1):
        assert_close(torch.cat([part[number] for part in parts]), whole[number])


def test_an_end_that_is_another_models_is_refused() -> None:
    there = model(eos_token_id=9)
    message = r"backbone: stops writing at token 9, but summaries end with token 3; backbone.tokenizer or backbone"
    kind = kind_of()
    batch = batch_of(kind, ROWS)
    with pytest.raises(UsageError, match=message):
        kind.inputs(batch, there.backbone.config)
    with pytest.raises(UsageError, match=message):
        kind.answers(torch.empty(0), batch, there)


def test_a_random_backbone_has_the_tokenizers_numbers() -> None:
    config = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    config |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    built: Any = build_backbone(BackboneConfig(config=config, tokenizer="toy")).config
    pad, start, end = IDS(["[PAD]", "[CLS]", "[SEP]"])
    found = (built.pad_token_id, built.bos_token_id, built.eos_token_id, built.decoder_start_token_id)
    assert (*found, built.forced_eos_token_id) == (pad, start, end, end, end)
    own = build_backbone(BackboneConfig(config={**config, "eos_token_id": 9}, tokenizer="toy"))
    assert own.config.eos_token_id == 9  # type: ignore[union-attr]


# -- what is predicted


def test_predictions_are_what_greedy_search_writes() -> None:
    kind, there = kind_of(max_target=7, min_target=3, beams=1, no_repeat_ngram=0), model()
    batch = batch_of(kind, ROWS)
    words = [greedy(there.backbone, ids, 7, 3) for ids in texts(batch["inputs"])]
    expected = toy_tokenizer().batch_decode(words, skip_special_tokens=True)
    assert kind.predictions(torch.empty(0), batch, there) == expected and all(expected)
    assert kind.truths(batch) == [["cat runs"], ["dog", "the dog"]]


def test_the_search_gets_every_option() -> None:
    options = {"max_target": 9, "min_target": 2, "beams": 4, "length_penalty": 0.6, "no_repeat_ngram": 1}
    kind, there, asked = kind_of(**options), model(), []

    class Recorder:
        backbone, head = there.backbone, there.head

        def __call__(self, inputs: Any, **settings: Any) -> list[list[int]]:
            asked.append(settings)
            return [[6], []]

    kind._writer = Recorder()  # type: ignore[assignment]
    assert kind.predictions(torch.empty(0), batch_of(kind, ROWS), there)[1] == ""
    shown = {"longest": 9, "shortest": 2, "beams": 4, "length_penalty": 0.6, "no_repeat_ngram": 1}
    assert asked == [shown]


def test_another_backbone_is_written_with_anew() -> None:
    kind = kind_of(**TOY)
    batch = batch_of(kind, ROWS)
    one, other = model(), model(seed=1)
    first = kind.answers(torch.empty(0), batch, one)
    assert kind.answers(torch.empty(0), batch, other) != first
    assert kind.answers(torch.empty(0), batch, one) == first


def test_answers_have_the_rows_name() -> None:
    there = model()
    for kind, keys in ((kind_of(**TOY), {"summary"}), (kind_of(**TOY, id="key"), {"id", "summary"})):
        rows = {"text": ROWS["text"], "key": ROWS["key"]}
        answers = kind.answers(torch.empty(0), batch_of(kind, rows, labelled=False), there)
        assert [set(answer) for answer in answers] == [keys] * 2
        if "id" in keys:
            assert [answer["id"] for answer in answers] == ["a", 7]


# -- inside methods


def rows_of_toy(train: int = 64) -> dict[str, Any]:
    return {
        split: toy_rows("toy_copy", split, size=size)
        for split, size in (("train", train), ("validation", 10), ("test", 6))
    }


def test_the_trivial_answer_is_the_first_sentence() -> None:
    rows = {"validation": [{"text": "the cat. A dog", "copy": "the cat"}, {"text": "fish", "copy": "dog"}]}
    module = build(FineTuneModule, task="toy_copy", backbone=backbone_setting("bart"))
    source = data(task="toy_copy", rows=rows)
    assert baseline_scores(module, source, "validation") == {"rougeL": 0.5, "rouge1": 0.5, "rouge2": 0.5}
    assert module.kind.trivial == "first sentence"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", TASK_METHODS)
def test_a_method_trains_validates_tests_and_predicts(method: Any, precision: Any, tmp_path: Path) -> None:
    module = build(method, task="toy_copy", backbone=backbone_setting("bart"))
    source = TaskDataModule(task="toy_copy", rows=rows_of_toy(), batch_size=16, eval_batch_size=4)
    fit = trainer(tmp_path, max_epochs=1, precision=precision)
    fit.fit(module, datamodule=source)
    assert {"val/loss", "val/rougeL", "val/rouge1", "val/rouge2"} <= set(fit.callback_metrics)
    assert not [name for name in module.state_dict() if name.startswith("head.")]
    scores = fit.test(module, datamodule=source, verbose=False)[0]
    rows = rows_of_toy()["test"]
    answers = [a for batch in trainer(precision=precision).predict(module, datamodule=source) or [] for a in batch]
    assert sorted(answer["row"] for answer in answers) == list(range(6))
    metrics = module.kind.metrics()
    metrics.update([a["summary"] for a in answers], [[rows[a["row"]]["copy"]] for a in answers])
    for name, value in metrics.compute().items():
        assert scores[f"test/{name}"] == pytest.approx(float(value), abs=1e-6 if precision == "32-true" else 0.05)
    again = load(tmp_path / "last.ckpt")
    if precision == "32-true":
        wanted = [answer["summary"] for answer in sorted(answers, key=lambda answer: answer["row"])]
        assert [answer["summary"] for answer in again.predict([row["text"] for row in rows])] == wanted
        assert copy.deepcopy(module).predict([row["text"] for row in rows]) == module.predict(
            [row["text"] for row in rows]
        )


def test_the_toy_task_is_learned() -> None:
    module = build(FineTuneModule, task="toy_copy", backbone=learner(), optim={"lr": 2e-3})
    source = data(task="toy_copy", batch_size=32)
    fit = trainer(max_epochs=12, limit_val_batches=0)
    fit.fit(module, datamodule=source)
    assert fit.test(module, datamodule=source, verbose=False)[0]["test/rougeL"] >= 0.95
    rows = toy_rows("toy_copy", "test")
    written = [answer["summary"] for answer in module.predict([row["text"] for row in rows])]
    assert sum(text == row["copy"] for text, row in zip(written, rows, strict=True)) >= 0.95 * len(rows)


def learner() -> dict[str, Any]:
    """A BART that learns to copy in seconds."""
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    counts = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return {"config": {"model_type": "bart", **sizes, **counts, "dropout": 0.0, "init_std": 0.1}, "tokenizer": "toy"}


# -- rows of the table


def test_rows_of_the_table() -> None:
    assert {name for name, task in TASKS.items() if task.kind == "generate"} == {
        *("xsum", "scitldr", "aeslc", "toy_copy")
    }
    assert TASKS["scitldr"].hub == ("allenai/scitldr", "Abstract") and TASKS["scitldr"].folder == "scitldr_a"


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "most"), [("xsum", 1), ("scitldr", 20), ("aeslc", 1)])
def test_real_summaries_are_read(name: str, most: int, shared_data: Path, encoder: str, cache_dir: Path) -> None:
    source = TaskDataModule(task=name, tokenizer=encoder, root=str(shared_data), max_length=64)
    longest = source.task.options.get("max_target", 64)
    first: dict[str, Any] = next(iter(source.batches("validation")))
    ends = {row[row != -100][-1].item() for row in first["labels"]}
    assert ends == {load_tokenizer(encoder).sep_token_id} and first["labels"].shape[1] <= longest
    counts = {len(reference["summary"]) for reference in first["references"]}
    assert min(counts) == 1 and (max(counts) > 1) == (most > 1)
    assert all(reference["first"] and ("id" in reference) == (name != "aeslc") for reference in first["references"])
