"""The data of a study's cells: each task is read once, each split of it drawn and tokenised once."""

from __future__ import annotations

import copy

from peft_lightning.backbones.build import as_backbone_config
from peft_lightning.data.encode import tokenizer_digest
from peft_lightning.data.few_shot import FewShotDataModule
from peft_lightning.data.source import open_source
from peft_lightning.study.cells import Cell
from peft_lightning.tasks.table import get_task

__all__ = ["Splits"]


class Splits:
    """Gives cells their data modules.

    Args:
        seeds: of the study.
    """

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds
        self._first: dict[str, FewShotDataModule] = {}
        self._drawn: dict[tuple[str, int, int], FewShotDataModule] = {}
        self._rows: dict[str, dict[str, str]] = {}

    def data(self, cell: Cell) -> FewShotDataModule:
        """Return a data module that belongs to nobody else, over encoded splits that all share.

        Raises:
            UsageError: an option leads to no data.
            DataError: the data cannot be used, or there are fewer rows than wanted.
        """
        group = self._group(cell)
        key = (group, cell.shots, cell.seed)
        if key not in self._drawn:
            drawn = copy.copy(self._of(cell))
            drawn.shots = cell.shots
            drawn.choose(cell.seed)
            drawn.seed = cell.seed
            # The next split is drawn from what this one has read.
            self._first[group] = drawn
            for stage in ("train", "validation", "test"):
                drawn.load(stage)
            self._drawn[key] = drawn
        return copy.copy(self._drawn[key])

    def rows(self, cell: Cell) -> dict[str, str]:
        """Return what identifies the rows of a cell's task, and how they become tokens."""
        group = self._group(cell)
        if group not in self._rows:
            data = self._of(cell)
            sources = {stage: open_source(data.task, stage, None, data.root).digest for stage in ("train", "test")}
            self._rows[group] = {**sources, "tokenizer": tokenizer_digest(data.tokenizer)}
        return self._rows[group]

    def _of(self, cell: Cell) -> FewShotDataModule:
        group = self._group(cell)
        if group not in self._first:
            regime = cell.regime
            self._first[group] = FewShotDataModule(
                get_task(regime.task or cell.task),
                shots=regime.shots[0],
                shots_mode=regime.shots_mode,
                calibration=regime.calibration,
                calibration_rows=regime.calibration_rows,
                seeds=self.seeds,
                test_rows=regime.test_rows,
                tokenizer=_tokenizer(cell),
                root=regime.root,
                splits=regime.splits,
                batch_size=regime.batch_size,
                eval_batch_size=regime.eval_batch_size,
                max_length=regime.max_length,
                cache_dir=regime.cache_dir,
            )
        return self._first[group]

    def _group(self, cell: Cell) -> str:
        """What cells share that read the same rows with the same tokenizer."""
        return f"{cell.task} {_tokenizer(cell)}"


def _tokenizer(cell: Cell) -> str:
    return as_backbone_config(cell.arguments["backbone"]).tokenizer_name
