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
        hub: path of a Hugging Face data set and, where it has one, its configuration.
        splits: which split each stage (train, validation, test, predict) reads; a stage left out reads the
            split of its own name, and ``predict`` reads ``test``.
        folder: the folder that holds the files under a data root; the task's name if empty.
        options: what the kind needs beyond these; its class says what there is.

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

    def __post_init__(self) -> None:
        for option in ("text", "labels", "metrics", "hub"):
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
    # These three are generated (data/toy.py) and need no files.
    Task(name="toy_sentiment", labels=("negative", "positive")),
    Task(name="toy_pairs", text=_PAIR, labels=("different", "same"), metrics=("accuracy", "f1")),
    Task(name="toy_similarity", kind="regress", text=_PAIR, metrics=("pearson", "spearman")),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
