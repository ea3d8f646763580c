"""What every data module of ours shares: splits that are prepared once, and one kind of loader for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, ClassVar

from lightning import LightningDataModule

from peft_lightning.data.loader import LengthGroupedSampler, Loader
from peft_lightning.errors import UsageError

__all__ = ["SplitDataModule", "share", "switch", "within"]


class SplitDataModule(LightningDataModule, ABC):
    """Base of the data modules: a subclass loads a split and says how its rows become batches."""

    stages: ClassVar[Mapping[str, tuple[str, ...]]]
    """From what a trainer does to the splits that it reads."""

    @abstractmethod
    def load(self, split: str) -> Any:
        """Read a split, from the cache where it is there; calling it again costs nothing."""

    @abstractmethod
    def loader(self, split: str) -> Loader:
        """Return this rank's batches of a split."""

    def prepare_data(self) -> None:
        """Fill the cache in one process, before the others read it."""
        if self.trainer is not None:
            self.setup(str(self.trainer.state.fn.value if self.trainer.state.fn else "fit"))

    def setup(self, stage: str) -> None:
        """Load the splits of ``stage``.

        Raises:
            UsageError: an option has a value that is not allowed, or leads to no data; or the stage is unknown.
            DataError: the data cannot be used.
        """
        if stage not in self.stages:
            raise UsageError(f"the stage is {stage}; allowed for this data: {', '.join(self.stages)}")
        for split in self.stages[stage]:
            if not (stage == "fit" and split == "validation" and self._validates_nothing):
                self.load(split)

    def train_dataloader(self) -> Loader:
        """Return the training batches of this rank."""
        return self.loader("train")

    def val_dataloader(self) -> Loader:
        """Return the validation batches of this rank."""
        return self.loader("validation")

    def test_dataloader(self) -> Loader:
        """Return the test batches of this rank."""
        return self.loader("test")

    @property
    def _validates_nothing(self) -> bool:
        return self.trainer is not None and self.trainer.limit_val_batches == 0

    def sampler(self, lengths: Any, batch_size: int, **options: Any) -> LengthGroupedSampler:
        """Return the sampler of this rank; ``options`` are those of :class:`LengthGroupedSampler`."""
        trainer = self.trainer
        return LengthGroupedSampler(
            lengths,
            batch_size,
            world_size=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            **options,
        )

    def epoch(self) -> Callable[[], int]:
        """Return what gives the number of the current epoch; overfitting means seeing the same batches again."""
        trainer = self.trainer
        return lambda: trainer.current_epoch if trainer and not getattr(trainer, "overfit_batches", 0) else 0


def within(option: str, value: Any, least: int, most: int | None = None) -> int:
    """Return ``value``, a whole number: neither True, nor 2.0, nor "2".

    Raises:
        UsageError: it is none, or lies outside its range; names the option and both.
    """
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{option} is {value!r}; allowed: a whole number, {allowed}")
    # NumPy's numbers are not what a checkpoint holds.
    number = int(value)
    if number < least or (most is not None and number > most):
        raise UsageError(f"{option} is {number}; allowed: {allowed}")
    return number


def share(option: str, value: Any) -> float:
    """Return ``value``, a number between 0 and 1.

    Raises:
        UsageError: it is none; names the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{option} is {value!r}; allowed: a number between 0 and 1, without these")
    number = float(value)
    if not 0 < number < 1:
        raise UsageError(f"{option} is {number}; allowed: between 0 and 1, without these")
    return number


def switch(option: str, value: Any) -> bool:
    """Return ``value``, true or false.

    Raises:
        UsageError: it is neither; names the option and the value.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{option} is {value!r}; allowed: true or false")
    return value
