"""What the pretraining benchmark compares: four arms of equal training time, and how each is trained.

All arms of a seed share initial weights, blocks and masks. The learning rate falls linearly to zero, which needs the
number of steps beforehand: each arm's speed is measured first (:func:`planned_steps`), so that all train for the same
seconds. ``cpu`` fits two cores; ``gpu`` takes a model of BERT-base's shape. The corpus is small: on a GPU it is read
many times over, which the table says.

The rate of ``cpu`` comes from short trials with ``mlm`` alone, before any arm was compared. Trials of 240 to 800 steps,
a tenth of them warm-up, at 1e-3 and 2e-3 did not get below the unigram entropy of 7.07. The first 1,100 steps of a run
of 3,300, with 330 of warm-up, reached 6.55 at 1e-3; at 5e-4 it was behind that after 300 steps (6.96 against 6.92).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from benchmarks.runs import Trial
from benchmarks.shared import ROOT, data_folder
from peft_lightning import BackboneConfig, DropConfig, MLMDataModule, OptimConfig, SCTDPretrainModule
from peft_lightning.errors import UsageError

__all__ = ["ARMS", "SUITES", "Recipe", "Suite", "planned_steps"]

ARMS = {
    "mlm": "MLM, nothing dropped",
    "token-drop": "token dropping",
    "drop+full": "token dropping, every Fi-th step full",
    "sctd": "SCTD",
}
_CYCLIC = ("drop+full", "sctd")


def planned_steps(windows: Sequence[float], interval: int, budget: float, points: int) -> int:
    """Return how many steps take ``budget`` seconds, a multiple of ``points``.

    Args:
        windows: seconds of windows of ``interval`` steps, each a whole cycle of ordinary and full steps.
        interval: steps of a window.
        budget: seconds to train.
        points: equally spaced validations, the last one after the last step.

    Raises:
        UsageError: not one step between two validations fits.

    >>> planned_steps([2.0, 2.2, 9.0], 10, 66.0, 15)
    300
    """
    step = median(windows) / interval
    # a little more than nothing: 66 / 0.22 is 299.99... in binary
    between = int(budget / step / points + 1e-9)
    if between < 1:
        raise UsageError(f"budget = {budget} s: a step takes {step:.3f} s, so {points} validations need more time")
    return points * between


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is pretrained.

    Attributes:
        budget: seconds of training, without validations.
        model: configuration of transformers.
        optim: the optimiser's settings.
        vocab_size: words of the tokenizer that is trained.
        block_size: tokens of a block.
        batch_size: blocks of a step.
        precision: the Trainer's.
        points: validations.
        eval_batch_size: blocks of a validation batch.
        eval_batches: batches of a validation.
        interval: Fi of the arms that have one, and the steps of a window of calibration.
        windows: windows of an arm in a turn of calibration.
        turns: of calibration.
        device: cpu or cuda.
        compile: whether steps are compiled.
        workers: processes that prepare batches.
    """

    budget: float
    model: dict[str, Any]
    optim: OptimConfig
    vocab_size: int = 8192
    block_size: int = 128
    batch_size: int = 16
    precision: str = "bf16-mixed"
    points: int = 15
    eval_batch_size: int = 64
    eval_batches: int = 16
    interval: int = 10
    windows: int = 2
    turns: int = 5
    device: str = "cpu"
    compile: bool = False
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A recipe, its seeds, and the tasks that every model is tuned on afterwards.

    Attributes:
        corpus: folder of the texts under the data's, or None for this repository's own documents.
        tasks: task -> how it is trained; the subsample of a task is its first ``steps`` batches in random order.
        tune_lr: learning rate of the tuning.
    """

    name: str
    recipe: Recipe
    corpus: str | None = "wikipedia_articles"
    seeds: tuple[int, ...] = (0, 1)
    tasks: dict[str, Trial] = field(default_factory=dict)
    tune_lr: float = 2e-4

    def on(self, device: str) -> Suite:
        """The same on a device."""
        tasks = {task: replace(trial, device=device) for task, trial in self.tasks.items()}
        return replace(self, recipe=replace(self.recipe, device=device), tasks=tasks)

    def tiny(self) -> Suite:
        """The same in seconds: a toy model, a little text, toy tasks."""
        return replace(
            self,
            recipe=replace(_TINY, device=self.recipe.device),
            corpus=None,
            tasks={
                task: Trial(epochs=1, steps=4, device=self.recipe.device) for task in ("toy_pairs", "toy_sentiment")
            },
            tune_lr=1e-3,
        )

    def drop(self, arm: str) -> DropConfig:
        """What an arm drops."""
        return DropConfig(preset=arm, interval=self.recipe.interval if arm in _CYCLIC else None)

    def module(self, arm: str, seed: int) -> SCTDPretrainModule:
        """An arm's untrained module."""
        backbone = BackboneConfig(config=self.recipe.model, compile=self.recipe.compile)
        return SCTDPretrainModule(backbone=backbone, drop=self.drop(arm), optim=self.recipe.optim, seed=seed)

    def data(self, seed: int) -> MLMDataModule:
        """The corpus of a seed, the same for all arms."""
        recipe = self.recipe
        documents = [str(ROOT / name) for name in ("README.md", "CONTRIBUTING.md")]
        return MLMDataModule(
            inputs=documents if self.corpus is None else str(data_folder() / self.corpus),
            vocab_size=recipe.vocab_size,
            block_size=recipe.block_size,
            batch_size=recipe.batch_size,
            eval_batch_size=recipe.eval_batch_size,
            held_out=0.2 if self.corpus is None else 0.05,
            seed=seed,
            workers=recipe.workers,
        )


def _bert(layers: int, width: int, heads: int, dropout: float) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


_TINY = Recipe(
    budget=0.9,
    model=_bert(4, 32, 2, 0.0),
    optim=OptimConfig(lr=2e-3),
    vocab_size=300,
    block_size=16,
    batch_size=4,
    precision="32-true",
    points=3,
    eval_batch_size=8,
    eval_batches=2,
    interval=2,
    windows=2,
    turns=2,
)

SUITES = {
    "cpu": Suite(
        name="cpu",
        # in ten minutes no text is read twice, so nothing is gained by dropout
        recipe=Recipe(budget=600.0, model=_bert(6, 256, 4, 0.0), optim=OptimConfig(lr=1e-3, betas=(0.9, 0.98))),
        tasks={
            "mrpc": Trial(epochs=3, precision="bf16-mixed"),
            "sst2": Trial(epochs=1, steps=320, precision="bf16-mixed"),
        },
    ),
    "gpu": Suite(
        name="gpu",
        recipe=Recipe(
            budget=480.0,
            model=_bert(12, 768, 12, 0.1),
            optim=OptimConfig(lr=4e-4, betas=(0.9, 0.98)),
            batch_size=256,
            eval_batch_size=256,
            eval_batches=8,
            windows=10,
            turns=3,
            device="cuda",
            compile=True,
            workers=4,
        ),
        tasks={
            "mrpc": Trial(epochs=3, device="cuda", precision="bf16-mixed"),
            "sst2": Trial(epochs=1, device="cuda", precision="bf16-mixed"),
        },
        tune_lr=5e-5,
    ),
}
