"""Prompts of the table, and those that a user gives in YAML."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.errors import UsageError
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.kinds.prompt import Prompt
from peft_lightning.tasks.prompts import MODES, PROMPTS, prompted
from peft_lightning.tasks.table import TASKS, Task, get_task
from peft_lightning.tasks.templates import word_numbers

# LM-BFF's manual prompts, with "<1>" for the first text, "<2>" for the second one.
LM_BFF = {
    "sst2": ("<1>. It was [MASK].", "terrible great"),
    "rotten_tomatoes": ("<1>. It was [MASK].", "terrible great"),
    "cola": ("<1>. This is [MASK].", "incorrect correct"),
    "mnli": ("<1>? [MASK], <2>.", "Yes Maybe No"),
    "mnli_mm": ("<1>? [MASK], <2>.", "Yes Maybe No"),
    "snli": ("<1>? [MASK], <2>.", "Yes Maybe No"),
    "rte": ("<1>? [MASK], <2>.", "Yes No"),
    "qnli": ("<1>? [MASK], <2>.", "Yes No"),
    "mrpc": ("<1>. [MASK], <2>.", "No Yes"),
    "qqp": ("<1>. [MASK], <2>.", "No Yes"),
    "stsb": ("<1>. [MASK], <2>.", "No Yes"),
}


def test_the_table_has_prompts_for_tasks_that_it_knows() -> None:
    assert set(PROMPTS) <= set(TASKS) and set(LM_BFF) <= set(PROMPTS)


@pytest.mark.parametrize("name", PROMPTS)
def test_every_row_makes_a_task(name: str) -> None:
    plain, task = get_task(name), get_task(f"{name}+prompt")
    kind = build_kind(task)
    assert isinstance(kind, Prompt) and len(kind.words) == (len(plain.labels) or 2)
    assert dataclasses.replace(task, kind=plain.kind, options={}) == plain
    assert Task(**dataclasses.asdict(task)) == task
    assert sorted(map(str, kind.metrics())) == sorted(plain.metrics)
    assert get_task(f"{name}+head") == plain


@pytest.mark.parametrize("name", LM_BFF)
def test_rows_are_those_of_the_paper(name: str) -> None:
    template, words = LM_BFF[name]
    kind = build_kind(get_task(f"{name}+prompt"))
    assert isinstance(kind, Prompt) and kind.words == tuple(words.split())
    texts = ["Alpha beta.", "Gamma delta."]
    found = "".join(
        part if isinstance(part, str) else " [MASK]" if part is None else part.of(texts) for part in kind.template.parts
    )
    second = "gamma delta" if len(kind.task.text) == 2 else ""
    assert found == template.replace("<1>", "Alpha beta").replace("<2>", second)


def test_modes() -> None:
    shown = [get_task(f"sst2+{mode}").options.get("demonstrate") for mode in MODES]
    assert shown == [None, "none", "random", "similar"]
    assert get_task("mnli+prompt-demo").options["sets"] == 4
    own = prompted(get_task("sst2"), "prompt", template="{mask}: {0}", words=["bad", "good"])
    assert own.options["template"] == "{mask}: {0}" and own.options["words"] == ["bad", "good"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sst2+promt", "task is read by 'promt'; allowed: head, prompt, prompt-demo, prompt-demo-similar"),
        ("nope+prompt", "task is 'nope'; allowed: cola"),
        ("copa+prompt", "task 'copa' is of kind choice; allowed with a prompt: classify, regress"),
        ("sst2+prompt+prompt", "task is read by 'prompt.prompt'; allowed"),
    ],
)
def test_wrong_names(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        get_task(spec)


def test_a_task_without_a_row_needs_a_template() -> None:
    task = Task(name="mine", labels=("a", "b"))
    with pytest.raises(UsageError, match="task 'mine' has no prompt; allowed: sst2, .*or a template and words"):
        prompted(task)
    assert build_kind(prompted(task, template="{0} {mask}", words=["no", "yes"])).num_outputs == 2


def test_a_prompt_in_yaml() -> None:
    text = """
        kind: prompt
        text: [sentence]
        labels: [negative, positive]
        folder: sst2
        options:
          template: "All in all {mask}: {0}."
          words: {positive: good, negative: bad}
    """
    task = get_task(yaml.safe_load(text))
    kind = build_kind(task)
    assert isinstance(kind, Prompt) and kind.words == ("bad", "good")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FewShotDataModule, "data")
    given: Any = parser.parse_object({"data": {"task": yaml.safe_load(text)}})
    assert parser.instantiate(given).data.task == task


@pytest.mark.real_data
def test_label_words_are_tokens_of_a_real_vocabulary(encoder: str) -> None:
    tokenizer = load_tokenizer(encoder)
    assert len(tokenizer) == 30522
    for name in PROMPTS:
        kind = build_kind(get_task(f"{name}+prompt"))
        assert isinstance(kind, Prompt)
        assert tokenizer.convert_ids_to_tokens(word_numbers(tokenizer, kind.words)) == [w.lower() for w in kind.words]
