"""The toy task of every kind: its rows, with right labels or shuffled ones, and settings that learn it in seconds."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from peft_lightning.backbones.toy import TOY_WORDS
from peft_lightning.data.toy import toy_rows
from peft_lightning.tasks.table import get_task
from tests.toy import TASK_METHODS, build, data, tiny, toy_sources

Row = dict[str, Any]
Rows = dict[str, list[Row]]
SIZES = {"train": 2048, "validation": 256, "test": 64}
# What is added to a random backbone must be large enough to matter beside it, and starts slowly to survive that.
_ADDED: dict[str, Any] = {"optim": {"lr": 1e-2, "warmup": 0.3}}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "FineTuneModule": {"optim": {"lr": 2e-3}},
    "FusionModule": {**_ADDED, "penalty": 1e-4},  # what random adapters give must be bent
    "MerAModule": _ADDED,
    "PruneLoRAModule": {**_ADDED, "lora": {"rank": 16, "high_rank": 16, "init_std": 0.1}},
    "SparseAdapterModule": {**_ADDED, "adapter": {"init_std": 0.1}},
}
PAIR_OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("regress", "SparseAdapterModule"): {"optim": {"lr": 5e-3, "warmup": 0.3}},
    ("generate", "SparseAdapterModule"): {"adapter": {"init_std": 0.2, "cross": True}},
}
PAIR_EPOCHS = {("regress", "SparseAdapterModule"): 6}
# These put adapters where SparseAdapter does, from the same layers: the kinds that ask most of them, instead of all.
SOME_KINDS = {"FusionModule": ("classify", "tags"), "MerAModule": ("generate", "prompt")}
# What their sources are like.
SOURCES: dict[str, dict[str, Any]] = {
    "generate": {"bottleneck": 64, "init_std": 0.2, "cross": True},
    **dict.fromkeys(("classify", "tags", "prompt"), {"bottleneck": 64}),
}


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A kind's task in the table, and what suits it.

    Attributes:
        task: its name.
        epochs: over 2,048 rows, with room above 0.95.
        spread: standard deviation of the random backbone's weights.
        label: the column to shuffle.
        alike: column whose number of entries rows must share to change labels with each other.
        chance: what an answer scores that knows how labels are distributed; None: the kind's baseline knows that much.
    """

    task: str
    epochs: int = 3
    spread: float = 0.1
    label: str = "label"
    alike: str = ""
    chance: float | None = None


TOYS = {
    "classify": Toy(task="toy_sentiment"),
    "regress": Toy(task="toy_similarity", epochs=4, spread=0.2),
    "choice": Toy(task="toy_choice", epochs=2, alike="choices"),
    "grouped": Toy(task="toy_groups", epochs=4),
    "marked": Toy(task="toy_marked"),
    "multilabel": Toy(task="toy_topics"),
    # places of entities are known by the number of words; one type always: a third found, two thirds to find
    "tags": Toy(task="toy_tags", alike="tokens", chance=0.4),
    "span": Toy(task="toy_span", label="answers"),
    "prompt": Toy(task="toy_sentiment+prompt"),
    # the text itself is the baseline; without it, two or three of 33 words
    "generate": Toy(task="toy_copy", epochs=6, spread=0.13, label="copy", chance=2.5 / 33),
}


def pairs() -> list[tuple[str, Any]]:
    """Kinds with the methods that are tried on them."""
    return [(kind, m) for kind in TOYS for m in TASK_METHODS if kind in SOME_KINDS.get(m.__name__, TOYS)]


def epochs_of(kind: str, method: Any) -> int:
    """How long a method learns a kind's toy task."""
    return PAIR_EPOCHS.get((kind, method.__name__), TOYS[kind].epochs)


def module_of(kind: str, method: Any, **options: Any) -> Any:
    """A module without dropout that learns a kind's toy task."""
    toy, name = TOYS[kind], method.__name__
    given = {**METHOD_OPTIONS.get(name, {}), **PAIR_OPTIONS.get((kind, name), {})}
    backbone = writer(toy.spread) if kind == "generate" else reader(toy.spread)
    if name in SOME_KINDS:
        given["sources"] = toy_sources(backbone, SOURCES[kind], SOURCES[kind])
    return build(method, task=toy.task, backbone=backbone, dropout=0.0, **{**given, **options})


def data_of(kind: str, rows: Rows, batch_size: int = 32, eval_batch_size: int = 64) -> Any:
    """The data of a kind's toy task."""
    return data(batch_size, TOYS[kind].task, rows=rows, eval_batch_size=eval_batch_size, max_length=32)


def reader(spread: float) -> dict[str, Any]:
    """A random BERT of two layers."""
    backbone = tiny(0.0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "initializer_range": spread}
    return {**backbone, "config": {**backbone["config"], **sizes}}


def writer(spread: float) -> dict[str, Any]:
    """A random BART of one layer each."""
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128}
    counts = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return {"config": {"model_type": "bart", **sizes, **counts, "dropout": 0.0, "init_std": spread}, "tokenizer": "toy"}


def rows_of(kind: str, sizes: dict[str, int] = SIZES) -> Rows:
    """Rows of the kind's toy task, the same each time; texts to copy are short, numbers lie round 0."""
    if kind == "generate":
        return short_copies(sizes)
    rows = {split: toy_rows(get_task(TOYS[kind].task).name, split, size=size) for split, size in sizes.items()}
    if kind == "regress":  # Adam remembers the large slopes of a mean that it has to find first for hundreds of steps
        rows = {split: [{**row, "label": row["label"] - 2.4} for row in part] for split, part in rows.items()}
    return rows


def short_copies(sizes: dict[str, int]) -> Rows:
    """Two or three words that have nothing to do with each other, no text twice."""
    words, rng = [word for group in TOY_WORDS.values() for word in group], random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < sum(sizes.values()):
        texts[" ".join(rng.sample(words, rng.randint(2, 3)))] = None
    rows: list[Row] = [{"text": text, "copy": text} for text in texts]
    ends = list(accumulate(sizes.values()))
    return {split: rows[end - size : end] for (split, size), end in zip(sizes.items(), ends, strict=True)}


def shuffled(kind: str, rows: list[Row]) -> list[Row]:
    """The rows with each other's labels; of a span its place among the words, whatever is written there."""
    toy, rng = TOYS[kind], random.Random(0)
    groups: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[len(row[toy.alike]) if toy.alike else 0].append(number)
    found: list[Row] = [{}] * len(rows)
    for numbers in groups.values():
        for number, other in zip(numbers, rng.sample(numbers, len(numbers)), strict=True):
            label = span_like(rows[other], rows[number]) if kind == "span" else rows[other][toy.label]
            found[number] = {**rows[number], toy.label: label}
    return found


def span_like(other: Row, row: Row) -> dict[str, Any]:
    """The words of ``row``'s context that stand where the answer stands in ``other``'s; its last if it is shorter."""
    (text,), (start,) = other["answers"]["text"], other["answers"]["answer_start"]
    words, count = row["context"].split(), len(text.split())
    first = min(len(other["context"][:start].split()), len(words) - count)
    return {
        "text": [" ".join(words[first : first + count])],
        "answer_start": [len(" ".join([*words[:first], ""]))],
    }


def stretched(kind: str, rows: list[Row]) -> list[Row]:
    """The rows with texts of other lengths, so that batches have padding; labels may not fit them.

    Two in three are longer; of spans, whose windows are as long as they may be, two in three are shorter.
    """
    column, words = get_task(TOYS[kind].task).text[-1], ["the", "red", "dog", "sleeps"]
    found = []
    for number, row in enumerate(rows):
        value, more = row[column], words * (number % 3)
        old = value if isinstance(value, list) else value.split()
        new = old[: len(old) - len(more) // 2] if kind == "span" else [*old, *more]
        found.append({**row, column: new if isinstance(value, list) else " ".join(new)})
    return found
