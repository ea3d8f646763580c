"""Demonstrations: one of each label, never the text itself, the nearer half on request."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from torch.testing import assert_close

from peft_lightning.errors import DataError
from peft_lightning.tasks.demonstrations import Demonstrations
from tests.reference import prompts as oracle

WORDS = ("cat", "dog", "red", "the", "runs", "eats", "is", "lazy")


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of a few words, some of them twice in a text."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 6)))] = None
    return list(found)


SHOTS = texts(21)
LABELS = [number % 3 for number in range(21)]


def shown(similar: bool = False) -> Demonstrations:
    return Demonstrations(SHOTS, LABELS, ("no", "maybe", "yes"), similar)


@pytest.mark.parametrize("similar", [False, True])
def test_one_of_each_label_and_never_the_text(similar: bool) -> None:
    for text in (*SHOTS, SHOTS[0].upper() + "  ", "a text of other words"):
        sets = shown(similar).sets(text, 16)
        assert len(set(sets)) == len(sets) == 16
        for chosen in sets:
            assert [LABELS[number] for number in chosen] == [0, 1, 2]
            assert text.lower().split() not in [SHOTS[number].split() for number in chosen]


def test_likeness_is_the_cosine_of_tf_idf() -> None:
    for text in (*texts(5, seed=9), "Red, RED cat!", "nothing known"):
        assert_close(shown().similarities(text), oracle.likeness(text, SHOTS), rtol=1e-9, atol=1e-12)
    assert shown().similarities(SHOTS[4])[4] == pytest.approx(1.0)


def test_only_the_nearer_half_is_drawn_from() -> None:
    for text in texts(6, seed=3):
        near = oracle.likeness(text, SHOTS)
        drawn = {number for chosen in shown(similar=True).sets(text, 64) for number in chosen}
        for label in range(3):
            own = sorted((n for n in range(21) if LABELS[n] == label), key=lambda n: (-round(near[n], 9), n))
            own = [n for n in own if SHOTS[n] != text]
            assert drawn & set(own) == set(own[: (len(own) + 1) // 2])


def test_sets_are_the_same_each_time_and_spread_over_all_shots() -> None:
    assert shown().sets(SHOTS[0], 16) == shown().sets(SHOTS[0], 16)
    assert shown().sets(SHOTS[0], 16)[:4] == shown().sets(SHOTS[0], 4)
    first = Counter(shown().sets(text, 1)[0][0] for text in texts(300, seed=5))
    assert set(first) == {n for n in range(21) if LABELS[n] == 0} and max(first.values()) < 100


def test_no_more_sets_than_there_are() -> None:
    few = Demonstrations(["a", "b", "c"], [0, 1, 1], ("no", "yes"), False)
    assert sorted(few.sets("d", 16)) == [(0, 1), (0, 2)]
    assert few.sets("b", 16) == [(0, 2)]


def test_a_label_without_another_shot() -> None:
    few = Demonstrations(["a", "b", "c"], [0, 1, 1], ("no", "yes"), False)
    with pytest.raises(DataError, match=r"label word 'no' has 1 shot\(s\), none but the text; wanted: another"):
        few.sets("A ", 1)
