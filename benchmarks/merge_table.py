"""The tables of the merge benchmark, made from its record and from nothing else."""

from __future__ import annotations

from statistics import median

from peft_lightning.study.records import RunRecord
from peft_lightning.study.tables import markdown_table

__all__ = ["merge_table"]

_FASTER, _PASSES, _MEGABYTES = 30, 1.3, 64


def merge_table(record: RunRecord) -> str:
    """Tables of merging by weights, by activations, and of statistics, and the line under them."""
    parts = [markdown_table(rows) for rows in (_weights(record), _activations(record), _statistics(record))]
    return "\n\n".join([*parts, _context(record)])


def _weights(record: RunRecord) -> list[dict[str, str]]:
    titles = {
        "default": "as the allocator likes",
        "fresh": "from the system each time",
        "kept": "kept by the allocator after use",
    }
    rows = []
    for state, title in titles.items():
        ours, naive = (record.series[f"weights/{state}/{name}"] for name in ("wts", "naive"))
        ratio = median(slow / fast for slow, fast in zip(naive, ours, strict=True))
        rows.append(
            {
                "memory for temporaries": title,
                "`wts`, ms": f"{1000 * median(ours):.0f}",
                "naive loop, ms": f"{1000 * median(naive):.0f}",
                "times faster": f"{ratio:.1f}",
                "goal": f"at least {_FASTER}" if state == "default" else "",
            }
        )
    return rows


def _activations(record: RunRecord) -> list[dict[str, str]]:
    titles = {"own": "each adapter on its own states", "shared": "all on the bare backbone's states"}
    rows = []
    for streams, title in titles.items():
        merge, passes = (record.series[f"activations/{name}_{streams}"] for name in ("acts", "passes"))
        ratio = median(a / b for a, b in zip(merge, passes, strict=True))
        rows.append(
            {
                "`acts`": title,
                "whole merge, s": f"{median(merge):.2f}",
                "forward passes, s": f"{median(passes):.2f}",
                "ratio": f"{ratio:.2f}",
                "goal": f"at most {_PASSES}" if streams == "own" else "",
            }
        )
    return rows


def _statistics(record: RunRecord) -> list[dict[str, str]]:
    rows = []
    for name, size in record.results.items():
        if name.startswith("activations/bytes/"):
            _, _, preset, tokens = name.split("/")
            rows.append(
                {
                    "preset": f"`{preset}`",
                    "tokens": f"{int(tokens):,}",
                    "statistics, MB": f"{size / 1e6:.1f}",
                    "goal": f"at most {_MEGABYTES}",
                }
            )
    return rows


def _context(record: RunRecord) -> str:
    environment, config = record.environment, record.config
    shape = config["shape"]
    changes = " with changes" if environment["dirty"] else ""
    return (
        f"{shape['count']} Houlsby adapters of {shape['neurons']} neurons at {2 * shape['layers']} sites, width "
        f"{shape['width']}, random weights and tokens, batches of {shape['rows']} x {shape['length']} tokens, fp32. "
        f"Medians of {config['turns']} merges by weights and {config['passes']} by activations, in turn with what they "
        "are compared with; ratios turn by turn. Both are whole merges with their report, for which `acts` reads an "
        "eighth of the tokens a second time. The naive loop goes adapter by adapter, takes all differences of neurons, "
        "and POT's exact transport; both give the same matrices. It waits for the system's pages for these differences "
        "most of the time, unless its allocator kept some: each row is a process of its own, in the first one glibc "
        f"decides. {environment['device']['name']}, {config['threads']} thread"
        f"{'s' if config['threads'] > 1 else ''}; torch {environment['versions']['torch']}; commit "
        f"{str(environment['commit'])[:12]}{changes}."
    )
