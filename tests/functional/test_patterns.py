"""Expressions that people write are compiled; those that could match for ever are refused, and quickly."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lightning.errors import UsageError
from peft_lightning.functional.patterns import LONGEST_PATH, compile_pattern

PATH = "encoder.layer.11.attention.self.query"
GOOD = [
    "",
    "query",
    r".*\.(query|key)",
    r".*layer.*attention.*query.*",
    r"^encoder\.layer\.\d+\.(attention\.output|output)$",
    r"layer\.[0-5]\.",
    r"layer\.(\d|1[01])\.attention",
    r"(?:encoder\.)?layer\.\d{1,2}\.(?P<part>attention|output).*(?<!key)$",
    r"^(?!.*visual).*(?:q_proj|v_proj)$",
    r"a{}b{x}[]*+?]+\]",
    r"(ab){2}c{3}d{,2}",
    r"^(?:[^.]+\.){3}query",
    "^(" + "|".join(rf"(encoder\.layer\.{i})\.(attention\.self\.(query|key)|output\.dense)" for i in range(126)) + ")$",
]
ENDLESS = [
    "(([a-z.0-9]+)+)+!",
    "(a|b)*!",
    "(a|aa)+!",
    "(.*)*!",
    "(.*){9}!",
    "(a?){64}!",
    ".*.*.*.*.*!",
    "a?" * 40 + "!",
    "(a|aa)" * 40 + "!",
    "x.*.*.*.*!",
    ".*.*.*.*!|x",
    "(((){1000}){1000}){1000}",
    "((){1000}){1000,}",
    "(?:(?:a+)?)+!",
    "(?=(a*)*!)",
    "a{0,99}" * 5,
    "(.*?)+?!",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_people_write(text: str) -> None:
    assert compile_pattern(text, "adapter.target") == re.compile(text)


@pytest.mark.parametrize("text", ENDLESS)
def test_what_could_match_for_ever(text: str) -> None:
    with pytest.raises(UsageError, match=r"adapter.target = .*may take too long to match; repeat no group"):
        compile_pattern(text, "adapter.target")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", r"target = '\(': not a regular expression"),
        (3, "target = 3: must be a regular expression"),
        ("a" * 100_001, "must have 100000 characters at most"),
        ("(" * 5000 + ")" * 5000, "not a regular expression|must have 30 groups"),
        ("(" * 40 + ")" * 40, "must have 30 groups inside each other at most"),
        ("(?i)query", r"groups of the kind '\(\?i\)' are not read here"),
        ("(?P<a>x)(?P=a)", r"groups of the kind '\(\?P=' are not read here"),
        ("(?#note)x", "are not read here"),
    ],
)
def test_other_refusals(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compile_pattern(text, "target")


@given(st.text(alphabet="a.|()*+?{}1,[]^\\d", max_size=24))
@settings(max_examples=500, deadline=None)
def test_what_passes_is_quick(text: str) -> None:
    """On the longest path that a file may give, matched in every way that the callers match."""
    try:
        pattern = compile_pattern(text, "target")
    except UsageError:
        return
    start = time.perf_counter()
    pattern.search("a" * LONGEST_PATH + "!")
    assert time.perf_counter() - start < 5


def test_matching_from_the_beginning_allows_one_repetition_more() -> None:
    text = "x.*.*.*.*!"
    assert compile_pattern(text, "target", whole=True).fullmatch(PATH) is None
