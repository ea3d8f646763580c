"""Few-shot data: K examples per class to train on, as many others to choose by, and the task's own split to report.

The protocol is LM-BFF's (https://arxiv.org/abs/2012.15723, section 3): shots and dev shots are drawn from the training
split, once per seed; validation reads the dev shots, and the task's evaluation split is read by ``test`` alone. MerA
(``papers/mera.txt``, section 3) does not say whether its 10, 20 and 30 shots are counted per class or in all, and
reports what it chose by: ``shots_mode`` does both, and nothing is chosen by what is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from peft_lightning.data.cache import Encoded
from peft_lightning.data.module import within
from peft_lightning.data.shots import Pool, draw, read_pool, sample, select
from peft_lightning.data.source import Source
from peft_lightning.data.supervised import TaskDataModule
from peft_lightning.errors import DataError, UsageError
from peft_lightning.tasks.kinds.base import build_kind
from peft_lightning.tasks.table import Task

__all__ = ["FewShotDataModule"]

_MODES = ("per_class", "total")
_CALIBRATIONS = ("shots", "pool")


class FewShotDataModule(TaskDataModule):
    """Read few rows of a task; how they are drawn is in ``data/shots.py``.

    A tag's class is its type of entity: K sentences for each type. A row of several labels counts for each. Answers
    that are spans, texts, numbers or places among choices are no classes: their tasks get K rows in all, and
    :meth:`regime` says so.

    A task with a prompt and demonstrations (``sst2+prompt-demo``) takes these from the shots; once the data is set up,
    ``task`` holds them, so that a module made with that task can answer single texts too.

    Args:
        task: a name from the table, or the fields of a task.
        shots: number K; there are as many dev shots.
        shots_mode: per_class (K of each class; of tags K sentences for each entity type) or total (K in all, as they
            come).
        seeds: of the draws that an experiment repeats.
        shot_seed: which of them is in use; the first if null.
        test_rows: reads at most so many rows of the evaluation split, the same for all seeds; all if null.
        calibration: what is read without labels, as by a merge of adapters: shots, or pool (rows of the training split
            whose inputs are neither shots nor dev shots).
        calibration_rows: number of rows of the pool, or all there are.
        options: those of :class:`TaskDataModule`.

    Raises:
        UsageError: an option has a value that is not allowed.
    """

    def __init__(
        self,
        task: str | Task,
        shots: int = 10,
        shots_mode: str = "per_class",
        seeds: Sequence[int] = (13, 21, 42, 87, 100),
        shot_seed: int | None = None,
        test_rows: int | None = None,
        calibration: str = "shots",
        calibration_rows: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if self.task.splits["test"] == self.task.splits["train"]:
            raise UsageError(
                f"splits: test and train both read {self.task.splits['train']!r}, so that shots would be tested on; "
                "give test another one"
            )
        self.shots = within("shots", shots, 1)
        if shots_mode not in _MODES:
            raise UsageError(f"shots_mode is {shots_mode!r}; allowed: {', '.join(_MODES)}")
        if not isinstance(seeds, list | tuple) or not seeds or len(set(seeds)) < len(seeds):
            raise UsageError(f"seeds is {seeds!r}; allowed: a list of different whole numbers")
        self.shots_mode = shots_mode
        self.seeds = tuple(within("seeds", seed, 0) for seed in seeds)
        self.test_rows = None if test_rows is None else within("test_rows", test_rows, 1)
        if calibration not in _CALIBRATIONS:
            raise UsageError(f"calibration is {calibration!r}; allowed: {', '.join(_CALIBRATIONS)}")
        self.calibration = calibration
        self.calibration_rows = within("calibration_rows", calibration_rows, 1)
        self._pool: Pool | None = None
        self.choose(self.seeds[0] if shot_seed is None else shot_seed)

    def choose(self, seed: int) -> None:
        """Go on with the draw of another seed.

        Raises:
            UsageError: it is none of ``seeds``.
        """
        if seed not in self.seeds:
            raise UsageError(f"shot_seed is {seed!r}; allowed: one of seeds, {', '.join(map(str, self.seeds))}")
        self.shot_seed = int(seed)
        self._numbers: tuple[list[int], list[int]] | None = None
        self._shown = False
        # The evaluation split is the same for all seeds, unless it is read beside the shots.
        stale = ("train", "validation", "pool", *(("test", "predict") if self._demonstrates else ()))
        self._encoded = {key: data for key, data in self._encoded.items() if key[0] not in stale}

    def numbers(self, stage: str) -> list[int]:
        """Return which rows of the training split ``train`` or ``validation`` reads, in the order they are read.

        Raises:
            UsageError: the stage is another one.
            DataError: the data cannot be used, or there are fewer rows than wanted.
        """
        if stage not in ("train", "validation"):
            raise UsageError(f"stage is {stage!r}; allowed: train, validation, which read shots")
        if self._numbers is None:
            classes = self.kind.classes() if self.shots_mode == "per_class" else ()
            self._numbers = draw(self.pool, self.shots, self.shot_seed, classes)
        return self._numbers[stage == "validation"]

    @property
    def pool(self) -> Pool:
        """The labelled rows of the training split, which shots are drawn from."""
        if self._pool is None:
            self._pool = read_pool(super().source("train"), self.kind)
        return self._pool

    def regime(self) -> dict[str, Any]:
        """Return what is drawn, and why so, as plain values for the record of a run."""
        mode, reason = self.shots_mode, ""
        if mode == "per_class" and not self.kind.classes():
            mode, reason = "total", f"kind {self.task.kind} has no classes to draw {self.shots} rows of each"
        counts = {stage: len(self.numbers(stage)) for stage in ("train", "validation")}
        plain = {"shots": self.shots, "shots_mode": mode, "reason": reason, "seed": self.shot_seed, **counts}
        pool = {"calibration_rows": self.calibration_rows} if self.calibration == "pool" else {}
        return {**plain, "test_rows": self.test_rows, "calibration": self.calibration, **pool}

    def source(self, split: str) -> Source:
        """Return the rows that a stage reads: shots and dev shots of the training split, or the task's own rows."""
        if split in ("train", "validation"):
            what = f"{self.shots} shots of seed {self.shot_seed}, {split}"
            return select(super().source("train"), self.kind, self.numbers(split), what)
        if split == "pool":
            drawn = [*self.numbers("train"), *self.numbers("validation")]
            rows = self.pool.others(drawn, self.calibration_rows, self.shot_seed)
            what = f"{len(rows)} rows beside the shots of seed {self.shot_seed}"
            return select(super().source("train"), self.kind, rows, what)
        source = super().source(split)
        if split != "test" or self.test_rows is None:
            return source
        rows = sample(read_pool(source, self.kind), self.test_rows)
        return select(source, self.kind, rows, f"{len(rows)} rows")

    def load(self, split: str) -> Encoded:
        """Return the encoded rows of a stage; see :meth:`TaskDataModule.load`.

        Raises:
            DataError: also if there are fewer rows than wanted.
        """
        if self._demonstrates and not self._shown:
            self._show()
        return super().load(split)

    def unlabelled(self, stage: str) -> Encoded:
        """Return the encoded rows of a stage without labels, for ``train`` what ``calibration`` says.

        Raises:
            DataError: also if there are fewer rows than wanted.
        """
        if self._demonstrates and not self._shown:
            self._show()
        return super().unlabelled("pool" if stage == "train" and self.calibration == "pool" else stage)

    @property
    def _demonstrates(self) -> bool:
        return self.kind.settings.get("demonstrate", "none") != "none"

    def _show(self) -> None:
        """Give the kind the shots, which it shows beside each text."""
        rows = super().source("train"), self.kind, self.numbers("train")
        shots = select(*rows, "shots to show").read()
        if not isinstance(shots, list):
            raise DataError("the shots are no list of rows")
        self.task = dataclasses.replace(self.task, options={**self.task.options, "shots": [dict(row) for row in shots]})
        self.kind, self._shown = build_kind(self.task), True
