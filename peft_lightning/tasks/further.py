"""Further rows of the table of tasks, as plain fields: multiple choice, words in context, inference, sentiment.

Columns have the names that plain files often give them; where the hub has others, ``also`` says so. The ``test`` stage
reads the validation split where the test split of the hub has no labels.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FURTHER"]

_Fields = dict[str, Any]
# Where the main branch is a script, which datasets no longer runs, the hub's own conversion is read.
_PARQUET = "@refs/convert/parquet"
_PAIR = ("sentence1", "sentence2")
_NLI: _Fields = {"text": ("premise", "hypothesis"), "labels": ("entailment", "neutral", "contradiction")}
_ANLI = {"train": "train_{}", "validation": "dev_{}", "test": "test_{}", "predict": "test_{}"}
_KEY = {"label": "answerKey"}
_EXAM = {**_KEY, "idx": "id"}
_TONES = ("negative", "positive")
_STARS = ("one", "two", "three", "four", "five")


def _row(name: str, *hub: str, **fields: Any) -> _Fields:
    return {"name": name, "hub": hub, **fields}


def _super_glue(name: str, config: str = "", **fields: Any) -> _Fields:
    return _row(name, "aps/super_glue", config or name, **{"splits": {"test": "validation"}, **fields})


def _choice(name: str, *hub: str, choices: tuple[str, ...] = ("choices",), **fields: Any) -> _Fields:
    options = {"choices": list(choices)} | {key: fields.pop(key) for key in ("blank", "names", "id") if key in fields}
    return _row(name, *hub, kind="choice", options=options, **{"splits": {"test": "validation"}, **fields})


FURTHER: tuple[_Fields, ...] = (
    _super_glue(
        "copa",
        kind="choice",
        text=("premise", "question"),
        options={
            "choices": ["choice1", "choice2"],
            "words": {"question": {"cause": "What brought this about?", "effect": "What came of it?"}},
        },
    ),
    _super_glue(
        "multirc",
        kind="grouped",
        text=("paragraph", "question"),
        labels=("wrong", "right"),
        metrics=("f1a", "em"),
        options={"group": ["idx_paragraph", "idx_question"], "joined": ["answer"], "id": "idx_answer"},
        also={f"idx_{part}": f"idx.{part}" for part in ("paragraph", "question", "answer")},
    ),
    _super_glue(
        "wic",
        kind="marked",
        text=_PAIR,
        labels=("different", "same"),
        options={
            "characters": {"sentence1": ["start1", "end1"], "sentence2": ["start2", "end2"]},
            "front": ["word"],
        },
    ),
    _super_glue(
        "wsc",
        kind="marked",
        labels=("different", "same"),
        options={
            "words": {"text": ["span1_index", "span1_text", "span2_index", "span2_text"]},
            "front": ["span1_text", "span2_text"],
        },
    ),
    _choice(
        "winogrande",
        "allenai/winogrande",
        "winogrande_l",
        text=("sentence",),
        choices=("option1", "option2"),
        blank="_",
        names=["1", "2"],
        also={"label": "answer"},
    ),
    _choice("commonsense_qa", "tau/commonsense_qa", text=("question",), id="id", also=_KEY),
    # Labels are texts from "1" on the hub, and may be numbers from 0 in files.
    _choice(
        "social_iqa",
        f"allenai/social_i_qa{_PARQUET}",
        text=("context", "question"),
        choices=("answerA", "answerB", "answerC"),
        names=["1", "2", "3"],
    ),
    _choice("piqa", f"ybisk/piqa{_PARQUET}", text=("goal",), choices=("sol1", "sol2")),
    _choice("hellaswag", "Rowan/hellaswag", text=("ctx",), choices=("endings",)),
    _choice("arc_easy", "allenai/ai2_arc", "ARC-Easy", text=("question",), id="idx", also=_EXAM, splits={}),
    _choice("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", text=("question",), id="idx", also=_EXAM, splits={}),
    _choice(
        "openbookqa",
        "allenai/openbookqa",
        "main",
        text=("question",),
        id="idx",
        also={"question": "question_stem", **_EXAM},
        splits={},
    ),
    _row("snli", "stanfordnlp/snli", **_NLI, unlabelled=("-1", "-")),
    _row("scitail", "allenai/scitail", "tsv_format", text=_NLI["text"], labels=("entails", "neutral")),
    _row("sick", f"RobZamp/sick{_PARQUET}", text=("sentence_A", "sentence_B"), labels=_NLI["labels"]),
    *(
        _row(
            f"anli_{part}",
            "facebook/anli",
            folder="anli",
            splits={stage: split.format(part) for stage, split in _ANLI.items()},
            **_NLI,
        )
        for part in ("r1", "r2", "r3")
    ),
    _row("paws", "google-research-datasets/paws", "labeled_final", text=_PAIR, labels=("different", "same")),
    _super_glue("boolq_closed_book", config="boolq", text=("question",), labels=("no", "yes")),
    # IMDb and Yelp have no split for validation on the hub: ``data.splits`` says what to take for it.
    _row("imdb", "stanfordnlp/imdb", labels=_TONES),
    _row("rotten_tomatoes", "cornell-movie-review-data/rotten_tomatoes", labels=_TONES),
    _row("yelp_polarity", "fancyzhx/yelp_polarity", labels=_TONES),
    _row("yelp_sentences", labels=_TONES),
    _row("yelp_reviews_5", "Yelp/yelp_review_full", labels=_STARS),
    _row("amazon_reviews_5", labels=_STARS),
)
