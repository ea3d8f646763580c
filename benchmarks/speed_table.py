"""The table of the speed benchmark, made from its record and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
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
    ("pfeiffer", "Pfeiffer adapters, dense", "full", 0.71),
    ("lora", "LoRA, rank 8 on query and value", "full", 0.76),
    ("peft_lora", "PEFT's LoRA, rank 8 on query and value (a peer)", "full", None),
    ("duel/lora", "LoRA over PEFT's, in four times as many turns", "duel/peft_lora", 1.0),
    ("parallel", "parallel adapters, dense", "full", None),
    ("mam", "MAM, dense", "full", None),
    ("passes", "forward and backward pass of the scored examples", "passes", None),
    ("score_snip", "SNIP, scores and masks, over these passes", "passes", 1.2),
    ("score_grasp", "GraSP, scores and masks, over these passes", "passes", 3.5),
    ("bare_loop", "bare loop over MRPC batches, a step with loading", "bare_loop", None),
    ("lightning_fit", "Lightning's fit over the same batches, over the bare loop", "bare_loop", 1.03),
)
_STARTUP_GOAL = 15
_MEMORY = {
    "full": "full fine-tuning",
    "houlsby": "Houlsby adapters, dense",
    "masks": "Houlsby adapters, 40 % masked",
    "bf16": "Houlsby adapters, frozen encoder in bfloat16",
    "pfeiffer": "Pfeiffer adapters, dense",
    "parallel": "parallel adapters, dense",
    "mam": "MAM, dense",
    "lora": "LoRA, rank 8 on query and value",
    "peft_lora": "PEFT's LoRA, rank 8 on query and value (a peer)",
    "score_snip": "Houlsby adapters while SNIP scores them",
    "score_grasp": "Houlsby adapters while GraSP scores them",
}


def _paired(record: RunRecord, name: str, reference: str) -> float:
    """Return the median of the ratios turn by turn: what slows the machine for a while slows both sides."""
    return median(a / b for a, b in zip(record.series[name], record.series[reference], strict=True))


def speed_table(record: RunRecord) -> str:
    """Return the tables of a record, times and memory, and the line under them."""
    results = record.results
    rows = []
    for name, title, reference, goal in _LINES:
        if name not in results or reference not in results:
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
    tables = [markdown_table(rows), *([markdown_table(memory)] if (memory := _memory(results)) else [])]
    return "\n\n".join([*tables, _context(record)])


def _memory(results: Mapping[str, float]) -> list[dict[str, str]]:
    full = results.get("memory/full")
    return [
        {
            "peak memory": title,
            "MiB": f"{results[f'memory/{name}'] / 2**20:.0f}",
            "over full fine-tuning": f"{results[f'memory/{name}'] / full:.2f}",
        }
        for name, title in _MEMORY.items()
        if full and f"memory/{name}" in results
    ]


def _context(record: RunRecord) -> str:
    environment, config = record.environment, record.config
    changes = " with changes" if environment["dirty"] else ""
    scored = config.get("scored_batches", 0)
    scores = f"Scores see {scored * config['rows']} examples in evaluation mode, in {config['rounds']} turns. "
    memory = (
        f"Memory: the resident set's peak over a few steps (or while scoring), less that of a process that has "
        f"imported everything and built nothing; median of {config.get('memory_repeats')} processes of their own. "
    )
    return (
        f"Batches of {config['rows']} rows of {config['tokens']} tokens, float32 where nothing else is said. "
        f"Medians of {config['steps']} steps in turn, ratios turn by turn "
        f"(loops: of {config['rounds']} rounds of as many steps). "
        f"{scores + memory if scored else ''}"
        f"{environment['device']['name']}, {config['threads']} threads; torch "
        f"{environment['versions']['torch']}; commit {str(environment['commit'])[:12]}{changes}."
    )
