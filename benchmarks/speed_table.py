"""The table of the speed benchmark, made from its record and from nothing else."""

from __future__ import annotations

from statistics import median

from peft_lightning.study.records import RunRecord
from peft_lightning.study.tables import markdown_table

__all__ = ["speed_table"]

# arm, title, arm that it is measured against, ratio to reach
_LINES = (
    ("full", "full fine-tuning, a step", "full", None),
    ("houlsby", "Houlsby adapters, dense", "full", 0.77),
    ("masks", "Houlsby adapters, 40 % masked, over dense", "houlsby", 1.02),
    ("bf16", "Houlsby adapters, frozen encoder in bfloat16", "full", 0.50),
    ("peft_lora", "PEFT's LoRA, rank 8 on query and value (a peer)", "full", None),
    ("bare_loop", "bare loop over MRPC batches, a step with loading", "bare_loop", None),
    ("lightning_fit", "Lightning's fit over the same batches, over the bare loop", "bare_loop", 1.03),
)
_STARTUP_GOAL = 15


def _paired(record: RunRecord, name: str, reference: str) -> float:
    """Return the median of the ratios turn by turn: what slows the machine for a while slows both sides."""
    return median(a / b for a, b in zip(record.series[name], record.series[reference], strict=True))


def speed_table(record: RunRecord) -> str:
    """Return the table of a record and the line under it."""
    results = record.results
    rows = []
    for name, title, reference, goal in _LINES:
        if name not in results:
            continue
        rows.append(
            {
                "what": title,
                "milliseconds": f"{1000 * results[name]:.1f}",
                "ratio": "" if name == reference else f"{_paired(record, name, reference):.3f}",
                "goal": "" if goal is None else f"at most {goal:.2f}",
            }
        )
    if "startup" in results:
        title = "from the shell to the end of a run of one step, warm cache"
        time = f"{1000 * results['startup']:.0f}"
        rows.append({"what": title, "milliseconds": time, "ratio": "", "goal": f"at most {_STARTUP_GOAL} s"})
    environment, config = record.environment, record.config
    changes = " with changes" if environment["dirty"] else ""
    return (
        f"{markdown_table(rows)}\n\n"
        f"Batches of {config['rows']} rows of {config['tokens']} tokens, float32 where nothing else is said. "
        f"Medians of {config['steps']} steps in turn, ratios turn by turn "
        f"(loops: of {config['rounds']} rounds of as many steps). "
        f"{environment['device']['name']}, {config['threads']} threads; torch "
        f"{environment['versions']['torch']}; commit {str(environment['commit'])[:12]}{changes}."
    )
