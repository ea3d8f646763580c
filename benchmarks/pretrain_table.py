"""The tables of the pretraining benchmark, made from its record and from nothing else.

An SCTD step at Fi = 10 is the mean over a cycle: nine steps that drop tokens and one semantic-consistent one.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from peft_lightning.functional.flops import EncoderShape, forward_flops
from peft_lightning.functional.tokens import kept_length
from peft_lightning.study.records import RunRecord
from peft_lightning.study.tables import markdown_table

__all__ = ["pretrain_table"]

_INTERVAL = 10
# what, numerator, denominator, ratio to reach; "cycle" is the mean over a cycle
_RATIOS = (
    ("token-drop step / mlm step", "dropping", "mlm", 0.77),
    ("semantic-consistent step / mlm step", "semantic", "mlm", None),
    ("semantic-consistent step, nothing shared / mlm step", "semantic_unshared", "mlm", None),
    ("SCTD at Fi 10 / mlm step", "cycle", "mlm", 0.82),
    ("SCTD at Fi 10 / dense step, head at the targets", "cycle", "dense", 0.77),
    ("SCTD at Fi 10 / transformers' BertForMaskedLM with labels", "cycle", "transformers", 0.70),
)
_MEMORY_GOAL, _LOADER_GOAL, _PACKED_GOAL = 1.4, 0.02, 3.0


def pretrain_table(record: RunRecord) -> str:
    """Tables of ratios, of memory, and where there are any of loading and throughput; and the line under them."""
    keys = list(record.config["settings"])
    parts = [markdown_table([row for key in keys for row in _ratio_rows(record, key)])]
    parts.append(markdown_table([row for key in keys for row in _memory_rows(record, key)]))
    if record.config["peak_flops"]:
        parts.append(markdown_table([row for key in keys for row in _speed_rows(record, key)]))
    if "loader" in record.results:
        parts.append(markdown_table(_text_rows(record, keys[0])))
    return "\n\n".join([*parts, _context(record)])


def _ratio_rows(record: RunRecord, key: str) -> list[dict[str, str]]:
    rows = []
    for title, over, under, goal in _RATIOS:
        pairs = zip(_series(record, key, over), _series(record, key, under), strict=True)
        rows.append(
            {
                "model, tokens": key,
                "step / step": title,
                "milliseconds": f"{1000 * median(_series(record, key, over)):.0f}",
                "ratio": f"{median(a / b for a, b in pairs):.3f}",
                "by operations": f"{_flops(record, key, over) / _flops(record, key, under):.3f}",
                "goal": "" if goal is None or key not in ("cpu", "tiny") else f"at most {goal:.2f}",
            }
        )
    return rows


def _series(record: RunRecord, key: str, arm: str) -> list[float]:
    if arm != "cycle":
        return record.series[f"{key}/{arm}"]
    return _cycle(lambda name: record.series[f"{key}/{name}"])


def _cycle(of: Callable[[str], list[float]]) -> list[float]:
    """Mean over a cycle, turn by turn."""
    both = zip(of("dropping"), of("semantic"), strict=True)
    return [((_INTERVAL - 1) * dropping + semantic) / _INTERVAL for dropping, semantic in both]


def _flops(record: RunRecord, key: str, arm: str) -> float:
    """Operations of a forward pass, of a block."""
    if arm == "cycle":
        return _cycle(lambda name: [_flops(record, key, name)])[0]
    setting = record.config["settings"][key]
    length, options = setting["length"], setting["config"]
    shape = EncoderShape(
        layers=options.get("num_hidden_layers", 12),
        width=options.get("hidden_size", 768),
        intermediate=options.get("intermediate_size", 3072),
        vocabulary=options["vocab_size"],
    )
    passes: dict[str, dict[str, Any]] = {
        "transformers": {"sparse_last": False, "masked_head": False},
        "dense": {"sparse_last": False},
        "mlm": {},
        "dropping": {"kept": kept_length(length, 0.5), "full": False},
        "semantic": {"kept": kept_length(length, 0.5)},
        "semantic_unshared": {"kept": kept_length(length, 0.5), "share_prefix": False},
    }
    return float(forward_flops(shape, length, round(0.15 * length), **passes[arm]))


def _memory_rows(record: RunRecord, key: str) -> list[dict[str, str]]:
    titles = {
        "transformers": "transformers' BertForMaskedLM with labels",
        "dense": "dense step, head at the targets",
        "mlm": "mlm step",
        "dropping": "token-drop step",
        "semantic": "semantic-consistent step",
        "semantic_unshared": "semantic-consistent step, nothing shared",
    }
    base = record.results[f"{key}/memory/mlm"]
    return [
        {
            "model, tokens": key,
            "peak memory": title,
            "MiB": f"{record.results[f'{key}/memory/{name}'] / 2**20:.0f}",
            "over an mlm step": f"{record.results[f'{key}/memory/{name}'] / base:.2f}",
            "goal": f"at most {_MEMORY_GOAL:.1f}" if name == "semantic" else "",
        }
        for name, title in titles.items()
        if f"{key}/memory/{name}" in record.results
    ]


def _speed_rows(record: RunRecord, key: str) -> list[dict[str, str]]:
    setting, rows = record.config["settings"][key], []
    for arm, title in (("transformers", "transformers"), ("mlm", "mlm"), ("cycle", "SCTD at Fi 10")):
        seconds = median(_series(record, key, arm))
        done = 3 * setting["blocks"] * _flops(record, key, arm)
        rows.append(
            {
                "model, tokens": key,
                "arm": title,
                "tokens a second": f"{setting['blocks'] * setting['length'] / seconds:,.0f}",
                "model FLOP utilisation": f"{done / seconds / record.config['peak_flops']:.1%}",
            }
        )
    return rows


def _text_rows(record: RunRecord, key: str) -> list[dict[str, str]]:
    share = record.results["loader"] / median(_series(record, key, "cycle"))
    return [
        {
            "what": "making a batch / SCTD step",
            "measured": f"{share:.4f}",
            "goal": f"at most {_LOADER_GOAL}",
        },
        {
            "what": "tokenising and packing, from files to a file",
            "measured": f"{record.results['packed_mb']:.1f} MB of text a second",
            "goal": f"at least {_PACKED_GOAL:.0f}",
        },
        {
            "what": "the tokenizer alone",
            "measured": f"{record.results['tokenised_mb']:.1f} MB of text a second",
            "goal": "",
        },
    ]


def _context(record: RunRecord) -> str:
    environment, config = record.environment, record.config
    models = "; ".join(
        f"{key}: {setting['config'].get('num_hidden_layers', 12)} layers of width "
        f"{setting['config'].get('hidden_size', 768)}, {setting['config']['vocab_size']:,} words, "
        f"{setting['blocks']} blocks of {setting['length']} tokens"
        for key, setting in config["settings"].items()
    )
    changes = " with changes" if environment["dirty"] else ""
    precision = f"{config['precision']}{', compiled' if config['compiled'] else ''}"
    return (
        f"{models}. {precision}, no dropout, half of the tokens kept. Medians of {config['turns']} steps in turn, "
        "ratios turn by turn; by operations: from the products alone, without the optimiser. Memory: weights, "
        f"gradients, averages and activations, the median of {config['memory_repeats']} measurements. "
        f"{environment['device']['name']}, {config['threads']} threads; torch {environment['versions']['torch']}; "
        f"commit {str(environment['commit'])[:12]}{changes}."
    )
