"""What the SparseAdapter benchmark compares: two suites of arms, each with its tasks and its recipe.

``mrpc`` fits two CPU cores: one task, a small encoder. ``gpu`` is the paper's tables 1, 3 and 4 with its recipe
(section 3): Adam with betas 0.9 and 0.98, decay 0.1, warm-up over a tenth of the steps, 512 tokens, and the metric
after the last epoch. From its grids one choice for all arms and tasks, so that none is chosen by its result: the
largest rate, 2e-4 (adapters start near zero), 32 rows, 10 epochs. The paper does not give the widths of its other
adapters; here all have Houlsby's 64, with which LoRA on query and value and MAM have Houlsby's number of weights, and
Pfeiffer half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.runs import Run, Trial
from benchmarks.shared import backbone
from peft_lightning import AdapterConfig, BackboneConfig, OptimConfig, PruneConfig, SparseAdapterModule

__all__ = ["SUITES", "Arm", "Suite"]

_TOYS = {
    "cola": "toy_sentiment",
    "mrpc": "toy_pairs",
    "stsb": "toy_similarity",
    "rte": "toy_pairs",
    "boolq": "toy_pairs",
    "conll2003": "toy_tags",
    "copa": "toy_choice",
    "squad_v1": "toy_span",
    "xsum": "toy_copy",
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the comparison: which adapter, what is removed, and the dense arm that it is compared with."""

    name: str
    title: str
    adapter: AdapterConfig = AdapterConfig()
    prune: PruneConfig
    baseline: str = "dense"

    @property
    def dense(self) -> bool:
        """Whether nothing is removed."""
        return not self.prune.active


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Arms, tasks and seeds with their recipe. ``encoder`` None means what ``make`` gives for (tiny, dtype)."""

    name: str
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    optim: OptimConfig
    trial: Trial
    encoder: str | None = None
    dtype: str = "float32"
    make: Callable[[bool, str], BackboneConfig] = backbone

    def runs(self, *, tiny: bool, device: str = "cpu", encoder: str | None = None) -> list[Run]:
        """Every run, seed by seed over all arms and tasks; ``tiny`` takes toy data and a few steps."""
        seeds = self.seeds[: 2 if len(self.tasks) == 1 else 1] if tiny else self.seeds
        # as toys, the fourth task is the second again
        tasks = self.tasks[:3] if tiny else self.tasks
        trial = replace(self.trial, device=device)
        if tiny:
            trial = Trial(epochs=1, steps=6, checks=min(3, self.trial.checks), batch_size=self.trial.batch_size)
        name = encoder or self.encoder
        own = tiny or name is None
        model = self.make(tiny, self.dtype) if own else BackboneConfig(name=name, dtype=self.dtype)
        return [self._run(arm, task, seed, trial, model, tiny) for seed in seeds for task in tasks for arm in self.arms]

    def stem(self, task: str, arm: Arm, seed: int) -> str:
        """The name of a run's record."""
        return f"{task}-{arm.name}-seed{seed}"

    def _run(self, arm: Arm, task: str, seed: int, trial: Trial, model: BackboneConfig, tiny: bool) -> Run:
        def build() -> SparseAdapterModule:
            return SparseAdapterModule(
                task=_TOYS.get(task, task) if tiny else task,
                backbone=model,
                adapter=arm.adapter,
                prune=arm.prune,
                optim=self.optim,
                seed=seed,
            )

        settings: Mapping[str, Any] = {
            "suite": self.name,
            "arm": arm.name,
            "task": task,
            "seed": seed,
            "adapter": asdict(arm.adapter),
            "prune": asdict(arm.prune),
            "optim": asdict(self.optim),
            "trial": asdict(trial),
            "dtype": self.dtype,
            "tiny": tiny,
        }
        name = self.stem(task, arm, seed)
        toy = tiny or task.startswith("toy_")
        return Run(name=name, settings=dict(settings), seed=seed, build=build, trial=trial, toy=toy)


def _pruned(score: str, percent: int, title: str) -> Arm:
    prune = PruneConfig(sparsity=percent / 100, score=score)
    return Arm(name=f"{score}{percent}", title=f"{percent} % removed {title}", prune=prune)


def _large(multiplier: int) -> Arm:
    prune = PruneConfig(score="snip", multiplier=multiplier)
    return Arm(name=f"large{multiplier}", title=f"Large-Sparse {multiplier}x by SNIP", prune=prune)


def _pair(kind: str, title: str) -> tuple[Arm, Arm]:
    """Another kind of adapter, dense and with what the paper calls S-: 40 % removed by SNIP."""
    adapter = AdapterConfig(kind=kind)
    dense = Arm(name=kind, title=f"{title}, dense", adapter=adapter, prune=PruneConfig(sparsity=0.0))
    prune = PruneConfig(sparsity=0.4, score="snip")
    return dense, Arm(name=f"s_{kind}", title=f"S-{title}", adapter=adapter, prune=prune, baseline=kind)


_DENSE = Arm(name="dense", title="Houlsby adapters, dense", prune=PruneConfig(sparsity=0.0))
_SCORES = (
    _pruned("random", 40, "at random"),
    _pruned("magnitude", 40, "by magnitude"),
    _pruned("er", 40, "as Erdos-Renyi graphs"),
    _pruned("snip", 40, "by SNIP"),
    _pruned("grasp", 40, "by GraSP"),
)

SUITES = {
    "mrpc": Suite(
        name="mrpc",
        arms=(_DENSE, *_SCORES, *(_pruned("snip", s, "by SNIP") for s in (20, 60, 80)), _large(2), _large(4)),
        tasks=("mrpc",),
        seeds=(0, 1, 2),
        optim=OptimConfig(lr=1e-3),
        # 115 steps an epoch: five checks are 23 steps apart, and the last one follows the last step
        trial=Trial(epochs=3, checks=5),
        dtype="bfloat16",
    ),
    "gpu": Suite(
        name="gpu",
        arms=(
            _DENSE,
            *_SCORES,
            *map(_large, (2, 3, 4)),
            *_pair("pfeiffer", "Pfeiffer"),
            *_pair("lora", "LoRA"),
            *_pair("mam", "MAM"),
        ),
        tasks=("cola", "mrpc", "stsb", "rte"),
        seeds=(0, 1, 2, 3, 4),
        optim=OptimConfig(lr=2e-4, betas=(0.9, 0.98), weight_decay=0.1, warmup=0.1),
        trial=Trial(epochs=10, max_length=512, precision="bf16-mixed"),
        encoder="FacebookAI/roberta-base",
    ),
}
