"""What the Prune-LoRA benchmark compares: arms, their presets, and two suites of tasks.

``cpu`` fits two cores: the small encoder, MRPC and RTE with three seeds and a fixed sample of SST-2 with one, preset
``tuned``. ``gpu`` is the paper's six tasks with BERT-base and both presets. Heads drawn at random are as many as those
chosen by importance, with the same ranks: the importance has to earn its place. Plain LoRA has one rank, the one that
comes nearest to the others' number of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.runs import Run, Trial
from benchmarks.shared import backbone
from peft_lightning import (
    BackboneConfig,
    FineTuneModule,
    ImportanceConfig,
    OptimConfig,
    PruneLoRAModule,
    RankConfig,
    StructureConfig,
)
from peft_lightning.task_module import TaskModule

__all__ = ["ARMS", "SUITES", "Arm", "Preset", "Suite"]

_TOYS = {"mrpc": "toy_pairs", "rte": "toy_pairs", "sst2": "toy_sentiment"}
_SAMPLE = 10_000


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe: ``paper`` is its section 4.1, ``tuned`` is configs/prune_lora_tuned.yaml."""

    name: str
    epochs: int
    lr: float
    full_lr: float
    classifier_steps: int


TUNED = Preset(name="tuned", epochs=5, lr=2e-3, full_lr=1e-4, classifier_steps=100)
PAPER = Preset(name="paper", epochs=30, lr=2e-5, full_lr=2e-5, classifier_steps=0)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the comparison; ``prune`` None means full fine-tuning, ``varied`` ranks by importance."""

    name: str
    title: str
    prune: StructureConfig | None
    varied: bool = True

    def module(self, preset: Preset, task: str, model: BackboneConfig, seed: int, blocks: int) -> TaskModule:
        """Return the untrained module of a seed; ``blocks`` is the number of the encoder's layers."""
        if self.prune is None:
            return FineTuneModule(task=task, backbone=model, optim=OptimConfig(lr=preset.full_lr), seed=seed)
        return PruneLoRAModule(
            task=task,
            backbone=model,
            importance=ImportanceConfig(classifier_steps=preset.classifier_steps),
            prune=self.prune,
            lora=RankConfig() if self.varied else one_rank(blocks),
            optim=OptimConfig(lr=preset.lr),
            seed=seed,
        )


def one_rank(blocks: int) -> RankConfig:
    """LoRA whose rank is nearest to the mean of rank 8 in 4 blocks and 4 in the others."""
    high = min(4, blocks)
    rank = round((8 * high + 4 * (blocks - high)) / blocks)
    return RankConfig(rank=rank, high_rank=rank)


ARMS = (
    Arm(name="full", title="full fine-tuning", prune=None),
    Arm(name="lora", title="LoRA, one rank", prune=StructureConfig(heads_to_prune=0), varied=False),
    Arm(name="prune", title="Prune-LoRA, heads by importance", prune=StructureConfig()),
    Arm(name="random", title="Prune-LoRA, as many heads at random", prune=StructureConfig(order="random")),
    Arm(name="ffn", title="Prune-LoRA, 30 % of the neurons too", prune=StructureConfig(ffn_to_prune=0.3)),
)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks with their seeds, presets, and the encoder; None means the small one of the benchmarks."""

    name: str
    tasks: Mapping[str, tuple[int, ...]]
    presets: tuple[Preset, ...]
    blocks: int
    encoder: str | None = None

    def runs(self, *, tiny: bool, device: str = "cpu", encoder: str | None = None) -> list[Run]:
        """Every run, seed by seed over presets, tasks and arms; ``tiny`` takes toy data and a few steps."""
        tasks = {task: seeds[:1] for task, seeds in list(self.tasks.items())[:2]} if tiny else self.tasks
        turns = [
            (seed, preset, task, arm)
            for seed in sorted({seed for seeds in tasks.values() for seed in seeds})
            for preset in self.presets
            for task in tasks
            for arm in ARMS
            if seed in tasks[task]
        ]
        return [self._run(*turn, tiny, device, encoder or self.encoder) for turn in turns]

    def stem(self, task: str, preset: Preset, arm: Arm, seed: int) -> str:
        """The name of a run's record."""
        return f"{task}-{preset.name}-{arm.name}-seed{seed}"

    def _run(self, seed: int, preset: Preset, task: str, arm: Arm, tiny: bool, device: str, encoder: str | None) -> Run:
        frozen = arm.prune is not None
        trial = Trial(epochs=preset.epochs, device=device, precision="32-true" if frozen else "bf16-mixed")
        if task == "sst2" and self.encoder is None:
            trial = replace(trial, sample=_SAMPLE)
        if tiny:
            trial = replace(trial, epochs=1, steps=6, sample=None)
        dtype = "bfloat16" if frozen else "float32"
        small = tiny or encoder is None
        model = backbone(tiny, dtype) if small else BackboneConfig(name=encoder, dtype=dtype)
        settings: dict[str, Any] = {
            "suite": self.name,
            "preset": asdict(preset),
            "arm": arm.name,
            "prune": None if arm.prune is None else asdict(arm.prune),
            "varied": arm.varied,
            "task": task,
            "seed": seed,
            "trial": asdict(trial),
            "tiny": tiny,
        }
        chosen = _TOYS.get(task, "toy_pairs") if tiny else task
        build = partial(arm.module, preset, chosen, model, seed, 2 if tiny else self.blocks)
        name = self.stem(task, preset, arm, seed)
        return Run(name=name, settings=settings, seed=seed, build=build, trial=trial, toy=tiny)


SUITES = {
    "cpu": Suite(name="cpu", tasks={"mrpc": (0, 1, 2), "rte": (0, 1, 2), "sst2": (0,)}, presets=(TUNED,), blocks=6),
    "gpu": Suite(
        name="gpu",
        tasks=dict.fromkeys(("mrpc", "rte", "sst2", "wnli", "qnli", "mnli"), (0, 1, 2)),
        presets=(TUNED, PAPER),
        blocks=12,
        encoder="google-bert/bert-base-uncased",
    ),
}
