"""What is said of an importance: means, correlations and verdicts, against NumPy and SciPy and planted orders."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.testing import assert_close

from peft_lightning.analysis.importance import importance_report, mean_importance, verdicts
from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.errors import UsageError
from peft_lightning.functional.sparsify import DegenerateScoreError
from peft_lightning.layers.importance import Importance
from peft_lightning.layers.prune_config import ImportanceConfig
from peft_lightning.layers.pruned_heads import AttentionSite, attention_sites
from tests.families import backbone_setting


@lru_cache
def sites(family: str = "bert") -> dict[str, AttentionSite]:
    """The attentions of 12 blocks with 12 heads, or of a small encoder-decoder."""
    setting = backbone_setting(family)
    if family == "bert":
        setting["config"] |= {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 24}
    return attention_sites(build_backbone(BackboneConfig(**setting)))


def importance(family: str = "bert", *, base: int = 0, noise: int = 0, share: float = 0.0, **more: Any) -> Importance:
    """A planted order of heads, with a share of another one."""
    units = {path: site.units for path, site in sites(family).items()}
    planted, other = (np.random.default_rng(seed).uniform(0.1, 1, sum(units.values())) for seed in (base, noise))
    values = torch.from_numpy((1 - share) * planted + share * other)
    parts = values.split(list(units.values()))
    return Importance(heads=dict(zip(units, parts, strict=True)), **{"examples": 8, "tokens": 50, **more})


def flat(heads: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in heads.values()])


def final(one: Importance, norm: str = "layer") -> dict[str, np.ndarray]:
    """Equation 2, written out."""
    raw = {path: part.numpy() for path, part in one.heads.items()}
    whole = np.sqrt((flat(raw) ** 2).sum())
    scaled = {path: part / (np.sqrt((part**2).sum()) if norm == "layer" else whole) for path, part in raw.items()}
    low, high = flat(scaled).min(), flat(scaled).max()
    return {path: (part - low) / (high - low) for path, part in scaled.items()}


def test_the_mean_of_measurements() -> None:
    ones = [
        Importance(
            heads={"a": torch.tensor(heads, dtype=torch.float64)},
            neurons={"b": torch.tensor(neurons, dtype=torch.float64)},
            blocks={"b": block},
            examples=examples,
            tokens=10 * examples,
        )
        for heads, neurons, block, examples in (([1.0, 2.0], [5.0], 1.0, 3), ([2.0, 6.0], [1.0], 2.0, 4))
    ]
    mean = mean_importance(ones)
    assert_close(mean.heads["a"], torch.tensor([1.5, 4.0], dtype=torch.float64), rtol=0, atol=0)
    assert_close(mean.neurons["b"], torch.tensor([3.0], dtype=torch.float64), rtol=0, atol=0)
    assert (mean.blocks, mean.examples, mean.tokens) == ({"b": 1.5}, 7, 70)


def test_measurements_of_different_units_have_no_mean() -> None:
    one = importance()
    with pytest.raises(UsageError, match="measured is empty"):
        mean_importance([])
    for other in (importance("bart"), importance(blocks={"encoder.layer.0": 1.0}), importance(neurons=one.heads)):
        with pytest.raises(UsageError, match="are of different heads, neurons or blocks"):
            mean_importance([one, other])


@pytest.mark.parametrize("norm", ["layer", "all"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_the_report_is_what_numpy_and_scipy_find(family: str, norm: str) -> None:
    measured = {
        task: {seed: importance(family, base=base, noise=seed, share=0.3) for seed in (7, 8, 9)}
        for task, base in (("mrpc", 1), ("rte", 2))
    }
    report = importance_report(measured, sites(family), ImportanceConfig(norm=norm))
    assert list(report["tasks"]) == ["mrpc", "rte"]
    for task, by_seed in measured.items():
        entry = report["tasks"][task]
        assert (entry["examples"], entry["tokens"]) == (24, 150)
        mean = {path: np.mean([one.heads[path].numpy() for one in by_seed.values()], 0) for path in sites(family)}
        expected = final(
            Importance(heads={p: torch.from_numpy(v) for p, v in mean.items()}, examples=1, tokens=1), norm
        )
        for path, values in entry["heads"].items():
            assert values == pytest.approx(expected[path].tolist(), abs=1e-12)
        owners = {block: [p for p, site in sites(family).items() if site.block == block] for block in entry["blocks"]}
        for block, score in entry["blocks"].items():
            assert score == pytest.approx(float(np.concatenate([expected[path] for path in owners[block]]).mean()))
        for seed, one in by_seed.items():
            assert flat(entry["by_seed"][str(seed)]) == pytest.approx(flat(final(one, norm)), abs=1e-12)
        for pair in entry["between_seeds"]["pairs"]:
            a, b = (flat(final(by_seed[seed], norm)) for seed in pair["seeds"])
            assert pair["correlation"] == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
        found = [pair["correlation"] for pair in entry["between_seeds"]["pairs"]]
        assert len(found) == 3 and entry["between_seeds"]["least"] == min(found)
        assert entry["between_seeds"]["mean"] == pytest.approx(np.mean(found))
        check_table(entry, mean)
    (row,) = report["between_tasks"]
    means = [flat(report["tasks"][task]["heads"]) for task in row["tasks"]]
    assert row["correlation"] == pytest.approx(spearmanr(*means).statistic, abs=1e-9)
    singles = [
        spearmanr(flat(final(measured["mrpc"][a], norm)), flat(final(measured["rte"][b], norm))).statistic
        for a in (7, 8, 9)
        for b in (7, 8, 9)
        if a != b
    ]
    assert row["single_seeds"] == pytest.approx(np.mean(singles), abs=1e-9)


def check_table(entry: dict[str, Any], raw: dict[str, np.ndarray]) -> None:
    """Every head once, the least important first."""
    table = entry["table"]
    values = [row["importance"] for row in table]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 1
    assert {(row["attention"], row["head"]) for row in table} == {
        (path, head) for path, part in raw.items() for head in range(len(part))
    }
    for row in table:
        assert entry["heads"][row["attention"]][row["head"]] == row["importance"]
        assert row["measured"] == pytest.approx(raw[row["attention"]][row["head"]])


def test_verdicts_tell_signal_from_noise() -> None:
    shares = {"sst2": 0.2, "rte": 0.55, "wnli": 1.0}
    measured = {
        task: {seed: importance(base=99, noise=1000 * n + seed, share=share) for seed in range(4)}
        for n, (task, share) in enumerate(shares.items())
    }
    report = importance_report(measured, sites(), ImportanceConfig())
    found = [report["tasks"][task]["between_seeds"]["mean"] for task in shares]
    assert found[0] > 0.8 and 0.3 < found[1] < 0.7 and abs(found[2]) < 0.2
    lines = verdicts(report)
    assert lines[0].startswith("sst2: rank correlation between seeds 0.") and lines[0].endswith(": signal")
    assert "lowest of 6 pairs" in lines[0]
    assert lines[1].endswith(": signal and noise") and lines[2].endswith(": mostly noise")
    assert len(lines) == 6
    for line in lines[4:]:  # with wnli
        assert line.endswith(": the seeds do not agree, so nothing is known")


def test_verdicts_tell_the_task_from_the_backbone() -> None:
    bases = {"mrpc": 1, "qqp": 1, "cola": 2}
    measured = {
        task: {seed: importance(base=base, noise=100 * n + seed, share=0.2) for seed in range(3)}
        for n, (task, base) in enumerate(bases.items(), 1)
    }
    lines = verdicts(importance_report(measured, sites(), ImportanceConfig()))[3:]
    assert [line.partition(": ")[0] for line in lines] == ["mrpc and qqp", "mrpc and cola", "qqp and cola"]
    assert lines[0].endswith("no less than between seeds, so the order is the backbone's")
    assert all(line.endswith(": the tasks differ") for line in lines[1:])


def test_one_seed_says_that_nothing_is_known() -> None:
    measured = {task: {42: importance(base=base)} for base, task in enumerate(("mrpc", "rte"))}
    report = importance_report(measured, sites(), ImportanceConfig())
    assert report["tasks"]["mrpc"]["between_seeds"] is None and report["between_tasks"][0]["single_seeds"] is None
    first, _, last = verdicts(report)
    assert first == "mrpc: rank correlation between seeds not measured: one seed"
    assert last == f"mrpc and rte: rank correlation between tasks {report['between_tasks'][0]['correlation']:.2f}"


def test_blocks_by_their_own_gates() -> None:
    gates = {site.block: float(i) for i, site in enumerate(sites().values())}
    measured = {"rte": {seed: importance(blocks={path: seed * v for path, v in gates.items()}) for seed in (1, 3)}}
    report = importance_report(measured, sites(), ImportanceConfig(blocks="gate"))
    assert report["tasks"]["rte"]["blocks"] == {path: 2 * value for path, value in gates.items()}
    with pytest.raises(UsageError, match="importance: has no blocks measured by a gate"):
        importance_report({"rte": {1: importance()}}, sites(), ImportanceConfig(blocks="gate"))


def test_what_ranks_nothing_is_an_error() -> None:
    flat_heads = {path: torch.ones(site.units, dtype=torch.float64) for path, site in sites().items()}
    with pytest.raises(DegenerateScoreError, match="all 144 units have the same"):
        importance_report({"rte": {1: Importance(heads=flat_heads, examples=1, tokens=1)}}, sites(), ImportanceConfig())
