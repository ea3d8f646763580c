"""The table of tasks: one row names the columns, the classes, the metrics and where the splits are.

A row says nothing about how it is encoded or trained: that is its kind (``tasks/kinds``). A task that is not
in the table needs no code: give its fields under ``task:`` in YAML, or a :class:`Task` from Python.

The public test splits of GLUE and SuperGLUE carry no labels. The ``test`` stage of these rows therefore reads
the validation split, as published results on them mostly do, and ``predict`` reads the unlabelled test split.

Sources: GLUE, https://arxiv.org/abs/1804.07461; SuperGLUE, https://arxiv.org/abs/1905.00537.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_lightning.errors import UsageError
from peft_lightning.tasks.further import FURTHER

_STAGES = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table. Every list may be given as a list or as a tuple.

    Args:
        kind: a kind of this package by its lower-cased class name, or ``package.module.Class`` elsewhere.
        text: one column, or two that are encoded as a pair.
        label: the column with the class (its number or its name), or with the number to predict.
        labels: names of the classes, in the order of their numbers; empty for a regression.
        metrics: names that ``tasks/metrics.py`` knows; the first one is monitored.
        name: shown in messages and records.
        hub: path of a Hugging Face data set (``path@revision`` for a revision) and, where it has one, its
            configuration.
        splits: which split each stage (train, validation, test, predict) reads; a stage left out reads the
            split of its own name, and ``predict`` reads ``test``.
        folder: the folder that holds the files under a data root; the task's name if empty.
        options: what the kind needs beyond these; its class says what there is.
        also: what files or repositories call a column that does not have its own name there; ``a.b`` is the entry b
            of the mappings in the column a.
        unlabelled: labels, as texts, that mean that a row has none; such rows are left out where labels are read.

    Raises:
        UsageError: a field has a value that is not allowed.
    """

    kind: str = "classify"
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    name: str = "custom"
    hub: tuple[str, ...] = ()
    splits: dict[str, str] = field(default_factory=dict)
    folder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    unlabelled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("name", "kind", "label", "folder"):
            if not isinstance(value := getattr(self, option), str):
                raise UsageError(f"task.{option} is {repr(value)[:200]}; allowed: a text")
        for option in ("splits", "options", "also"):
            if not isinstance(value := getattr(self, option), Mapping):
                raise UsageError(f"task.{option} is {repr(value)[:200]}; allowed: a mapping")
        for option in ("text", "labels", "metrics", "hub", "unlabelled"):
            object.__setattr__(self, option, self._names(option))
        object.__setattr__(self, "folder", self.folder or self.name)
        if unknown := sorted(set(self.splits) - set(_STAGES)):
            raise UsageError(f"task.splits names the stage {unknown[0]!r}; allowed: {', '.join(_STAGES)}")
        object.__setattr__(self, "splits", {**_STAGES, **self.splits})
        if len(self.text) not in (1, 2) or not all(self.text):
            raise UsageError(f"task.text is {list(self.text)}; allowed: the names of one or two columns")
        if len(set(self.labels)) < len(self.labels):
            raise UsageError(f"task.labels is {list(self.labels)}; allowed: a list of different names")
        if not self.metrics:
            raise UsageError("task.metrics is empty; allowed: at least one metric")

    def _names(self, option: str) -> tuple[str, ...]:
        names = getattr(self, option)
        # A lone string is a sequence of letters, which would pass every later check.
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"task.{option} is {names!r}; allowed: a list of strings")
        return tuple(names)


def get_task(spec: str | Task | Mapping[str, Any]) -> Task:
    """Return the row called ``spec``, or the row that ``spec`` spells out.

    ``NAME+MODE``, such as ``sst2+prompt``, is the row with the prompt of ``tasks/prompts.py``.

    Raises:
        UsageError: no row has this name, or a mapping holds a field that a task does not have.

    >>> get_task("mrpc").metrics
    ('accuracy', 'f1')
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, Mapping):
        fields = Task.__dataclass_fields__
        if unknown := sorted(set(spec) - set(fields)):
            raise UsageError(f"task has the field {unknown[0]!r}; allowed: {', '.join(fields)}")
        return Task(**spec)
    if isinstance(spec, str) and "+" in spec:
        from peft_lightning.tasks.prompts import prompted

        name, _, mode = spec.partition("+")
        return prompted(get_task(name), mode)
    if not isinstance(spec, str) or spec not in TASKS:
        raise UsageError(f"task is {spec!r}; allowed: {', '.join(TASKS)}, or the fields of a task")
    return TASKS[spec]


_PAIR = ("sentence1", "sentence2")
_NLI: dict[str, Any] = {
    "text": ("premise", "hypothesis"),
    "labels": ("entailment", "neutral", "contradiction"),
}
_MATCHED = {"validation": "validation_matched", "test": "validation_matched", "predict": "test_matched"}
_MISMATCHED = {stage: split.replace("matched", "mismatched") for stage, split in _MATCHED.items()}


def _glue(name: str, config: str = "", path: str = "nyu-mll/glue", **fields: Any) -> Task:
    return Task(name=name, hub=(path, config or name), **{"splits": {"test": "validation"}, **fields})


def _super_glue(name: str, **fields: Any) -> Task:
    return _glue(name, path="aps/super_glue", **fields)


_PARQUET = "@refs/convert/parquet"


def _summary(name: str, text: str, label: str, hub: tuple[str, ...], **options: Any) -> Task:
    where: dict[str, Any] = {key: options.pop(key) for key in ("folder", "also") if key in options}
    where |= {"hub": hub, "metrics": ("rouge2", "rouge1", "rougeL")}
    return Task(name=name, kind="generate", text=(text,), label=label, options=options, **where)


def _squad(name: str, **fields: Any) -> Task:
    splits = {"test": "validation", "predict": "validation"}
    given: dict[str, Any] = {"options": {"id": "id"}, "splits": splits, "metrics": ("f1", "exact_match"), **fields}
    return Task(name=name, kind="span", text=("question", "context"), label="answers", **given)


# In the order of the hub's numbers.
_CONLL = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
_ONTONOTES = tuple(
    "O B-CARDINAL B-DATE I-DATE B-PERSON I-PERSON B-NORP B-GPE I-GPE B-LAW I-LAW B-ORG I-ORG B-PERCENT I-PERCENT "
    "B-ORDINAL B-MONEY I-MONEY B-WORK_OF_ART I-WORK_OF_ART B-FAC B-TIME I-CARDINAL B-LOC B-QUANTITY I-QUANTITY I-NORP "
    "I-LOC B-PRODUCT I-TIME B-EVENT I-EVENT I-FAC B-LANGUAGE I-PRODUCT I-ORDINAL I-LANGUAGE".split()
)


def _tagged(name: str, label: str, labels: tuple[str, ...], hub: tuple[str, ...] = ()) -> Task:
    metrics = ("f1", "precision", "recall", "accuracy")
    return Task(name=name, kind="tags", text=("tokens",), label=label, labels=labels, metrics=metrics, hub=hub)


_ROWS = (
    _glue("cola", text=("sentence",), labels=("unacceptable", "acceptable"), metrics=("mcc",)),
    _glue("sst2", text=("sentence",), labels=("negative", "positive")),
    _glue("mrpc", text=_PAIR, labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
    _glue(
        "qqp",
        text=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    _glue("stsb", kind="regress", text=_PAIR, metrics=("pearson", "spearman")),
    _glue("mnli", **_NLI, splits=_MATCHED),
    _glue("mnli_mm", config="mnli", folder="mnli", **_NLI, splits=_MISMATCHED),
    _glue("qnli", text=("question", "sentence"), labels=("entailment", "not_entailment")),
    _glue("rte", text=_PAIR, labels=("entailment", "not_entailment")),
    _glue("wnli", text=_PAIR, labels=("not_entailment", "entailment")),
    _super_glue("boolq", text=("question", "passage"), labels=("no", "yes")),
    _super_glue(
        "cb",
        text=("premise", "hypothesis"),
        labels=("entailment", "contradiction", "neutral"),
        metrics=("accuracy", "macro_f1"),
    ),
    *(Task(**fields) for fields in FURTHER),
    # Summaries of one sentence. ROUGE-2 comes first, as papers on adapters choose by it; the search on XSum is BART's.
    _summary(
        "xsum",
        hub=(f"EdinburghNLP/xsum{_PARQUET}",),
        text="document",
        label="summary",
        id="id",
        min_target=10,
        max_target=128,
    ),
    # On the hub these are lists, of a text's sentences and of summaries, in a script that datasets no longer runs.
    _summary(
        "scitldr",
        hub=("allenai/scitldr", "Abstract"),
        folder="scitldr_a",
        text="document",
        label="summary",
        targets="all_targets",
        id="id",
        also={"document": "source", "summary": "target", "all_targets": "target", "id": "paper_id"},
    ),
    _summary(
        "aeslc",
        hub=(f"Yale-LILY/aeslc{_PARQUET}",),
        text="document",
        label="summary",
        max_target=32,
        also={"document": "email_body", "summary": "subject_line"},
    ),
    _squad("squad_v1", hub=("rajpurkar/squad",)),
    _squad("squad_v2", hub=("rajpurkar/squad_v2",), options={"id": "id", "unanswerable": True}),
    # Both hub paths lead to Parquet: the original repositories are scripts, which datasets no longer runs. OntoNotes
    # is licensed by the LDC: see to it that you may use it.
    _tagged("conll2003", "ner_tags", _CONLL, hub=("lhoestq/conll2003",)),
    _tagged("ontonotes", "tags", _ONTONOTES, hub=("tner/ontonotes5@refs/convert/parquet",)),
    # These are generated (data/toy.py) and need no files.
    Task(name="toy_sentiment", labels=("negative", "positive")),
    Task(name="toy_choice", kind="choice", text=("question",), options={"choices": ["choices"]}),
    Task(
        name="toy_groups",
        kind="grouped",
        text=("paragraph", "question"),
        labels=("wrong", "right"),
        metrics=("f1a", "em"),
        options={"group": ["paragraph", "question"], "joined": ["answer"]},
    ),
    Task(
        name="toy_marked",
        kind="marked",
        labels=("apart", "together"),
        # words of the toy language that its sentences here do not have
        options={"words": {"text": ["index1", "word1", "index2", "word2"]}, "marks": ["good", "bad"]},
    ),
    Task(
        name="toy_topics",
        kind="multilabel",
        text=_PAIR,
        labels=("growth", "bulk"),
        metrics=("f1_micro", "f1_macro", "accuracy"),
    ),
    _tagged("toy_tags", "label", ("O", "B-LIKED", "I-LIKED", "B-DISLIKED", "I-DISLIKED")),
    Task(name="toy_pairs", text=_PAIR, labels=("different", "same"), metrics=("accuracy", "f1")),
    Task(name="toy_similarity", kind="regress", text=_PAIR, metrics=("pearson", "spearman")),
    Task(
        name="toy_span",
        kind="span",
        text=("question", "context"),
        label="answers",
        metrics=("f1", "exact_match"),
        # windows so short that many contexts need two
        options={"window": 13, "stride": 4, "max_question": 2, "max_answer": 3},
    ),
    Task(
        name="toy_copy",
        kind="generate",
        label="copy",
        metrics=("rougeL", "rouge1", "rouge2"),
        options={"max_target": 10, "beams": 2, "no_repeat_ngram": 0},
    ),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
