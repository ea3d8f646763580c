"""The tables of the scaling benchmark, made from its record and from nothing else."""

from __future__ import annotations

from statistics import median

from benchmarks.scaling_arms import ARMS
from benchmarks.scaling_model import MACHINES, Load, bounds
from peft_lightning.study.records import RunRecord
from peft_lightning.study.tables import markdown_table

__all__ = ["RANKS", "scaling_table"]

RANKS = (1, 8, 16, 64, 256)


def scaling_table(record: RunRecord) -> str:
    """Return the tables of a record, on paper and measured, and the lines under them."""
    tables = [markdown_table(_sizes(record))]
    for machine in record.config["machines"]:
        tables.append(f"{MACHINES[machine].title}:\n\n{markdown_table(_growth(record, machine))}")
    tables.append(f"Measured on {record.config['processes']} local processes:\n\n{markdown_table(_measured(record))}")
    return "\n\n".join([*tables, _context(record)])


def _load(record: RunRecord, name: str) -> Load:
    return Load(**record.config["loads"][name])


def _sizes(record: RunRecord) -> list[dict[str, str]]:
    rows = []
    for name in ARMS:
        load = _load(record, name)
        rows.append(
            {
                "method": _title(name),
                "MB summed a step": f"{load.bytes / 1e6:,.2f}",
                "in parts": f"{load.parts}",
                "MB sent and received by a rank of many": f"{load.passes * load.bytes / 1e6:,.2f}",
                "TFLOP a step": f"{load.flops / 1e12:,.3f}",
            }
        )
    return rows


def _growth(record: RunRecord, machine: str) -> list[dict[str, str]]:
    rows = []
    for name in ARMS:
        row, load = {"method": _title(name)}, _load(record, name)
        for ranks in RANKS:
            least, most = bounds(load, MACHINES[machine], ranks)
            alone = bounds(load, MACHINES[machine], 1)[0]
            text = f"{1 / least:,.1f}" if ranks == 1 else f"{1 / most:,.1f} to {1 / least:,.1f} ({alone / most:.0%})"
            row[f"steps/s on {ranks}"] = text
        rows.append(row)
    return rows


def _measured(record: RunRecord) -> list[dict[str, str]]:
    rows = []
    for name in ARMS:
        ways = {way: record.series[f"{name}/{way}"] for way in ("alone", "beside", "together", "sending")}
        middle = {way: 1000 * median(seconds) for way, seconds in ways.items()}
        passes = _load(record, name).passes / 2
        waiting = (record.config["parts"][name] - 1) * record.results["latency"]  # the first message's is in the sum
        times = zip(ways["beside"], ways["sending"], strict=True)
        paper = [beside + passes * (sent + waiting) for beside, sent in times]
        counted = record.config["counted"].get(name)
        rows.append(
            {
                "method": _title(name),
                "MB summed": "" if counted is None else f"{counted / 1e6:,.2f}",
                "ms alone": f"{middle['alone']:.1f}",
                "ms beside another": f"{middle['beside']:.1f}",
                "ms with it": f"{middle['together']:.1f}",
                "efficiency": f"{_ratio(ways['alone'], ways['together']):.3f}",
                "of sending alone": f"{_ratio(ways['beside'], ways['together']):.3f}",
                "measured over paper": f"{_ratio(ways['together'], paper):.3f}",
            }
        )
    return rows


def _ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios turn by turn."""
    return median(a / b for a, b in zip(above, below, strict=True))


def _title(name: str) -> str:
    method, _, strategy = name.partition("-")
    return f"{method}, {strategy}" if strategy else method


def _context(record: RunRecord) -> str:
    environment, config = record.environment, record.config
    changes = " with changes" if environment["dirty"] else ""
    return (
        f"On paper: a {config['paper_shape']} with {config['paper_rows']} rows of each device (64 tokens; SCTD 128, "
        "its dropping step), bfloat16, gradients in float32; speeds of machines are assumed "
        "(`benchmarks/scaling_model.py`). Steps per second with no and with all sending hidden behind computing, in "
        "brackets the least efficiency over one device. "
        f"Measured: a {config['shape']}, {config['rows']} rows of each process, one thread each, over gloo; "
        f"medians of {config['turns']} turns, ratios turn by turn. Efficiency: a step alone over a step with the other "
        "process; of sending alone: two steps at once that send nothing over two that do. On paper the measured step "
        "is the one beside another, the time that its bytes take to be summed (half as long again under fsdp2), and "
        f"{1000 * record.results['latency']:.2f} ms for each part after the first. "
        f"{environment['device']['name']}; torch {environment['versions']['torch']}; "
        f"commit {str(environment['commit'])[:12]}{changes}."
    )
