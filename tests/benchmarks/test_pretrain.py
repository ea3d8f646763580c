"""The pretraining benchmark end to end on a small model: every arm is timed, and the tables say against what."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from torch.testing import assert_close

from benchmarks import pretrain
from benchmarks.pretrain_arms import ARMS, build_arm, settings, token_batch
from benchmarks.pretrain_table import pretrain_table
from peft_lightning.study.records import RunRecord, read_record


def test_tiny(tmp_path: Path, cache_dir: Path) -> None:
    pretrain.main(["--tiny", "--threads", "1", "--out", str(tmp_path)])
    record = read_record(tmp_path / "cpu.json")
    assert all(len(record.series[f"tiny/{arm}"]) == 2 for arm in ARMS)
    text = pretrain_table(record)
    series = {arm: record.series[f"tiny/{arm}"] for arm in ARMS}
    cycle = [(9 * a + b) / 10 for a, b in zip(series["dropping"], series["semantic"], strict=True)]
    ratio = median(a / b for a, b in zip(cycle, series["transformers"], strict=True))
    assert f"BertForMaskedLM with labels | {1000 * median(cycle):.0f} | {ratio:.3f} |" in text
    memory = record.results["tiny/memory/semantic"] / record.results["tiny/memory/mlm"]
    assert f"| {memory:.2f} | at most 1.4 |" in text
    assert f"| {record.results['packed_mb']:.1f} MB of text a second | at least 3 |" in text
    assert record.results["loader"] > 0


def test_operations_are_the_papers_for_bert_base() -> None:
    """The shares that a count by hand gives (12 layers of width 768, 512 tokens, 77 targets)."""
    config = {"vocab_size": 30522}
    series = {f"base/{arm}": [1.0] for arm in ARMS} | {f"base/memory/{arm}": [1.0] for arm in ARMS}
    record = RunRecord(
        name="pretrain",
        status="finished",
        config={
            **{"settings": {"base": {"config": config, "blocks": 8, "length": 512}}, "precision": "bfloat16 autocast"},
            **{"compiled": True, "peak_flops": 989e12, "turns": 1, "memory_repeats": 1, "threads": 1},
        },
        data={},
        model={},
        seeds={},
        environment={"commit": "a", "dirty": False, "device": {"name": "p"}, "versions": {"torch": "2"}},
        results={name: values[0] for name, values in series.items()},
        series=series,
    )
    text = pretrain_table(record)
    assert "| SCTD at Fi 10 / mlm step | 1000 | 1.000 | 0.793 |  |" in text
    assert "| SCTD at Fi 10 / dense step, head at the targets | 1000 | 1.000 | 0.747 |  |" in text
    assert "| base | mlm | 4,096 |" in text and "model FLOP utilisation" in text


def test_arms_learn_the_same_from_the_same_batch() -> None:
    """Not a race between different things: dense, mlm and the library's model make the same first update."""
    setting = settings(tiny=True, device="cpu")["tiny"]
    batch = token_batch(setting)
    ends = []
    for name in ("transformers", "dense", "mlm"):
        step = build_arm(name, setting, batch)
        step()
        variables = dict(
            zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__ or ()), strict=True)
        )
        model = variables["model"] if name == "transformers" else variables["module"].model
        ends.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
    for key, tensor in ends[0].items():
        for other in ends[1:]:
            assert_close(other[key], tensor, rtol=1e-4, atol=1e-6, msg=key)
