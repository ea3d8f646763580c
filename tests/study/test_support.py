"""The table in the README is the one that the code gives, and has a cell for everything that is tested."""

from __future__ import annotations

from pathlib import Path

from peft_lightning.study.support import support_table
from peft_lightning.study.tables import generated
from tests.families import CELLS, OPTIONS, REFUSED

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_has_the_table_that_the_code_gives() -> None:
    assert generated(README.read_text(encoding="utf-8"), "support") == support_table()


def test_every_cell_is_tested_or_refused() -> None:
    text = support_table()
    assert text.count("| yes") == len(CELLS)
    assert text.count("| no (") == len(REFUSED)
    assert {family for family, _ in CELLS} == set(OPTIONS)
    assert "(1) prefixes enter the attention of bert and roberta only." in text
