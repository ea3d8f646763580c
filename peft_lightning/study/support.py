"""The table of what attaches to what, for the documentation: generated from the code that attaches."""

from __future__ import annotations

from peft_lightning.backbones.families import FAMILIES
from peft_lightning.layers.adapters import KINDS, refusal
from peft_lightning.study.tables import markdown_table

__all__ = ["support_table"]


def support_table() -> str:
    """Architectures (``model_type`` of transformers) by kinds of adapters, with the reason where a cell is refused."""
    reasons = dict.fromkeys(filter(None, (refusal(family, kind) for family in FAMILIES for kind in KINDS)))
    numbers = {reason: number for number, reason in enumerate(reasons, start=1)}
    rows = []
    for family in FAMILIES:
        cells = {kind: refusal(family, kind) for kind in KINDS}
        shown = {kind: "yes" if reason is None else f"no ({numbers[reason]})" for kind, reason in cells.items()}
        rows.append({"architecture": f"`{family}`", **shown})
    notes = "\n".join(f"({number}) {reason}." for reason, number in numbers.items())
    return f"{markdown_table(rows)}\n\n{notes}"
