"""Prompts of the table's tasks: a template around the text, and a word for each label.

Templates and words are LM-BFF's manual ones (https://arxiv.org/abs/2012.15723, table 1 and ``run_experiment.sh``); rows
marked as ours are not in it. ``{0}`` and ``{1}`` are the task's texts, ``{mask}`` is where the word stands. ``:bare``
takes punctuation off a text's end (LM-BFF drops the last character, whatever it is), ``:lower`` makes its first letter
a small one, ``:bare,lower`` does both.

A prompt of one's own needs no code: a task of kind ``prompt`` in YAML, with ``template`` and ``words`` as options. YAML
reads Yes and No without quotes as true and false, and the command line reads "Topic {mask}: {0}", with nothing after
it, as a mapping; both end in an error that shows what was read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft_lightning.errors import UsageError
from peft_lightning.tasks.table import Task

__all__ = ["MODES", "PROMPTS", "prompted"]

_Row = dict[str, Any]
MODES = ("head", "prompt", "prompt-demo", "prompt-demo-similar")
"""Ways to read a task: its own head, words at a mask, and these with demonstrations, drawn at random or by likeness."""

_TONE: _Row = {"template": "{0} It was {mask}.", "words": {"negative": "terrible", "positive": "great"}}
_STARS: _Row = {
    "template": "{0} It was {mask}.",
    "words": {"one": "terrible", "two": "bad", "three": "okay", "four": "good", "five": "great"},
}
_FOLLOWS = "{0:bare}? {mask}, {1:lower}"
_THREE: _Row = {
    "template": _FOLLOWS,
    "words": {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
}
_TWO: _Row = {"template": _FOLLOWS, "words": {"entailment": "Yes", "not_entailment": "No"}}
_SAME = "{0} {mask}, {1:lower}"
_MANY: _Row = {"sets": 4}

PROMPTS: dict[str, _Row] = {
    "sst2": _TONE,
    "rotten_tomatoes": _TONE,
    "cola": {"template": "{0} This is {mask}.", "words": {"unacceptable": "incorrect", "acceptable": "correct"}},
    "mnli": {**_THREE, **_MANY},
    "mnli_mm": {**_THREE, **_MANY},
    "snli": {**_THREE, **_MANY},
    "rte": _TWO,
    "qnli": _TWO,
    "mrpc": {"template": _SAME, "words": {"not_equivalent": "No", "equivalent": "Yes"}},
    "qqp": {"template": _SAME, "words": {"not_duplicate": "No", "duplicate": "Yes"}, **_MANY},
    "stsb": {"template": _SAME, "words": ["No", "Yes"], "bounds": [0.0, 5.0]},
    # Ours from here on.
    "imdb": _TONE,
    "yelp_polarity": _TONE,
    "yelp_sentences": _TONE,
    "yelp_reviews_5": _STARS,
    "amazon_reviews_5": _STARS,
    "cb": _THREE,
    "sick": _THREE,
    **dict.fromkeys(("anli_r1", "anli_r2", "anli_r3"), _THREE),
    "scitail": {"template": _FOLLOWS, "words": {"entails": "Yes", "neutral": "No"}},
    "wnli": _TWO,
    "paws": {"template": _SAME, "words": {"different": "No", "same": "Yes"}},
    "boolq": {"template": "{1} Question: {0:bare}? Answer: {mask}.", "words": {"no": "No", "yes": "Yes"}},
    "boolq_closed_book": {"template": "Question: {0:bare}? Answer: {mask}.", "words": {"no": "No", "yes": "Yes"}},
    "toy_sentiment": {"template": "{0} this is {mask}", "words": {"negative": "bad", "positive": "good"}},
    "toy_pairs": {"template": "{0} {mask} {1}", "words": {"different": "not", "same": "looks"}},
    "toy_similarity": {"template": "{0} {mask} {1}", "words": ["tiny", "huge"], "bounds": [0.0, 4.0]},
}
"""Options of the kind ``prompt`` by the name of a task."""


def prompted(task: Task, mode: str = "prompt", **options: Any) -> Task:
    """Return ``task`` as it is read with a prompt.

    Args:
        task: of kind classify or regress.
        mode: one of :data:`MODES`.
        options: of the kind ``prompt``; they come before those of the task's row here.

    Raises:
        UsageError: the mode is unknown, the task is of another kind, or no row here has its name and no template is
            given.

    >>> from peft_lightning.tasks.table import get_task
    >>> prompted(get_task("cola")).options["template"]
    '{0} This is {mask}.'
    """
    if mode not in MODES:
        raise UsageError(f"task is read by {mode!r}; allowed: {', '.join(MODES)}")
    if mode == "head":
        return task
    if task.kind not in ("classify", "regress"):
        raise UsageError(f"task {task.name!r} is of kind {task.kind}; allowed with a prompt: classify, regress")
    row = PROMPTS.get(task.name, {})
    if not row and "template" not in options:
        raise UsageError(f"task {task.name!r} has no prompt; allowed: {', '.join(PROMPTS)}, or a template and words")
    shown = {"prompt-demo": "random", "prompt-demo-similar": "similar"}.get(mode, "none")
    return dataclasses.replace(task, kind="prompt", options={**row, "demonstrate": shown, **options})
