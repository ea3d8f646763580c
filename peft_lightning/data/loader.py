"""The one sampler and the one loader: stateful, sharded over ranks, grouping rows of similar length.

The sampler plans an epoch as a pure function of (seed, epoch, rank), so a run goes on from any batch by
planning again and leaving out the first ones. The loader counts the batches that its consumer took, which
with workers is less than what they prepared. What a batch is made into is the business of ``data/collate.py``.

Shapes: B rows of a batch, G = batch size x ranks the rows of a global batch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peft_lightning.errors import DataError, UsageError

# Rows are sorted by length within this many global batches: enough to leave little padding, few enough to
# leave the order of training random.
_CHUNK = 50
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Batch(NamedTuple):
    """The rows of a batch of one rank, and where they stand.

    Attributes:
        rows: their numbers in the split, int64 [B].
        places: their places in the global batch, int64 [B].
        epoch: in which they are read.
        number: of the batch in its epoch, the same on all ranks.
        valid: whether the rows count; a batch that does not is one row of padding.
    """

    rows: np.ndarray
    places: np.ndarray
    epoch: int
    number: int
    valid: bool = True


class LengthGroupedSampler:
    """Deal the rows of a split out to ranks, in batches of similar length.

    In training, each epoch has its own random order. Rank r takes every ``world_size``-th row of a global
    batch, so one process with batch 2B sees the same global batches as two with B. The rows that do not
    fill a global batch come last and are dealt out likewise; if they are fewer than the ranks and not
    ``every`` row is wanted, or only ``whole`` batches are, this epoch leaves them out.

    In evaluation, the longest rows come first, and no row is repeated or lost. All ranks have equally
    many batches: a rank that has no row left gets one row of padding, as where ``every`` row is wanted.

    Args:
        lengths: number of tokens per row, [N].
        batch_size: rows per batch of one rank.
        shuffle: whether to train on the rows, or to evaluate.
        seed: seeds the orders.
        world_size: number of ranks.
        rank: which of them this is.
        whole: whether training leaves out what does not fill a global batch, so that all have one shape.
        every: whether a random order, too, leaves out nothing.

    Raises:
        UsageError: ``batch_size`` is below 1.
        DataError: training has fewer rows than ranks, or than a whole global batch; or evaluation has none.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        whole: bool = False,
        every: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; allowed: at least 1")
        steps = shuffle and not every
        if len(lengths) < (world_size if steps else 1):
            raise DataError(f"the split has {len(lengths)} rows for {world_size} ranks; allowed: one for each")
        if shuffle and whole and len(lengths) < (size := batch_size * world_size):
            raise DataError(f"the split has {len(lengths)} rows for a global batch of {size}; allowed: at least {size}")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.world_size, self.rank = world_size, rank
        # The fewest rows that make a batch.
        self._fewest = (batch_size * world_size if whole else world_size) if steps else 1

    @property
    def global_batch_size(self) -> int:
        """Rows of a global batch, G."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Number of batches of a rank in an epoch."""
        full, rest = divmod(len(self.lengths), self.global_batch_size)
        return full + (rest >= self._fewest)

    def plan(self, epoch: int) -> list[Batch]:
        """Return this rank's batches of ``epoch``, in order."""
        rows = self._training_order(epoch) if self.shuffle else np.argsort(-self.lengths, kind="stable")
        size = self.global_batch_size
        shares = [rows[start : start + size] for start in range(0, len(self) * size, size)]
        return [self._share(share, epoch, number) for number, share in enumerate(shares)]

    def _share(self, share: np.ndarray, epoch: int, number: int) -> Batch:
        if self.rank >= len(share):
            return Batch(share[:1], np.zeros(1, np.int64), epoch, number, valid=False)
        return Batch(
            share[self.rank :: self.world_size], np.arange(self.rank, len(share), self.world_size), epoch, number
        )

    def _training_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        rows = rng.permutation(len(self.lengths))
        size = self.global_batch_size
        # The rest is set aside before sorting; after it, the same shortest rows would be left out every time.
        full, rest = np.split(rows, [len(rows) // size * size])
        chunks = [full[start : start + _CHUNK * size] for start in range(0, len(full), _CHUNK * size)]
        by_length = [chunk[np.argsort(-self.lengths[chunk], kind="stable")] for chunk in chunks]
        batches = np.concatenate([np.empty(0, np.int64), *by_length]).reshape(-1, size)
        return np.concatenate([rng.permutation(batches).ravel(), rest])


class Loader:
    """Iterate over the batches of the current epoch; can be stopped and continued between any two.

    Args:
        collate: makes the tensors of a batch, ``{name: tensor or such a mapping}``; nothing but the batch decides
            what they hold. With workers it is called in their processes.
        sampler: plans the epochs.
        epoch: returns the number of the current epoch; called when the first batch is asked for.
        workers: processes that prepare batches.
        stream: what else decides the batches, by name: options and digests. Only a state with the same one is gone on
            with.
    """

    def __init__(
        self,
        collate: Callable[[Batch], dict[str, Any]],
        sampler: LengthGroupedSampler,
        epoch: Callable[[], int] = lambda: 0,
        workers: int = 0,
        stream: Mapping[str, int | bool | str] | None = None,
    ) -> None:
        self._collate, self._sampler = collate, sampler
        self._stream = dict(stream or {})
        self._current_epoch, self._workers = epoch, workers
        self._epoch, self._position = 0, 0
        self._continued = False

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator's body runs at the first next(): Lightning calls iter() more often than it reads.
        epoch = self._current_epoch()
        start = self._position if self._continued and epoch == self._epoch else 0
        self._epoch, self._position, self._continued = epoch, start, False
        for batch in self._batches(self._sampler.plan(epoch)[start:]):
            self._position += 1
            yield batch

    def _batches(self, plan: list[Batch]) -> Iterator[dict[str, Any]]:
        pin = torch.cuda.is_available()
        if self._workers:
            loader = torch.utils.data.DataLoader(
                _Planned(plan, self._collate),
                batch_size=None,
                num_workers=self._workers,
                pin_memory=pin,
                # Without its own generator, each epoch would draw from the global one and change training.
                generator=torch.Generator(),
                worker_init_fn=partial(_wait_for_the_owner, threading.current_thread() is threading.main_thread()),
            )
            with _held_back():
                batches = iter(loader)
            yield from batches
        else:
            for batch in plan:
                yield _pin(self._collate(batch)) if pin else self._collate(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches that were taken, and what decides them."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "global_batch_size": self._sampler.global_batch_size,
            "stream": dict(self._stream),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, if the next epoch to be read is the same; else with its beginning.

        Raises:
            UsageError: the state is of another stream, or its steps are of another number of rows.
        """
        # Older states do not say what they are of.
        if changed := _changes(state.get("stream") or {}, self._stream):
            raise UsageError(f"{', '.join(changed)}; allowed to go on with a run: the data that it began with")
        size = self._sampler.global_batch_size
        if state["position"] and state["global_batch_size"] != size:
            saved = state["global_batch_size"]
            how = "on twice as many devices give half of data.batch_size"
            raise UsageError(
                f"batch_size times ranks is {size}; allowed to go on with a run: {saved}, as before ({how})"
            )
        self._epoch, self._position, self._continued = state["epoch"], state["position"], True


class _Planned(torch.utils.data.Dataset[dict[str, Any]]):
    """The batches of a plan, as what PyTorch's workers read."""

    def __init__(self, plan: list[Batch], collate: Callable[[Batch], dict[str, Any]]) -> None:
        self.plan, self.collate = plan, collate

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.collate(self.plan[number])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs of what both know; nobody can read a digest."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return [
        f"{name}: not the same" if isinstance(now[name], str) else f"{name} is {now[name]}, was {before[name]}"
        for name in names
    ]


def _wait_for_the_owner(in_main: bool, number: int) -> None:
    """Have a signal to the whole group of processes end the one that reads, which saves first, and not its workers.

    They end when it does, however that is and also if they are stopped, or when SIGTERM comes from it. They are started
    with all three signals held back.

    Args:
        in_main: whether the owner's main thread starts this: Linux ends a process with the thread that began it.
        number: of the worker.
    """
    if in_main and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    for each in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGUSR1))
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_by, args=(os.getppid(),), daemon=True).start()
    else:  # macOS does not say who sends a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def _end_by(owner: int) -> None:
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != owner:
        pass
    os._exit(128 + signal.SIGTERM)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals wait until the end of this, also in processes that are started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pin(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    return {name: _pin(value) for name, value in batch.items()}
