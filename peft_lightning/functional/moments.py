"""Streamed second moments of the neurons of several adapters at one site.

Everything that MerA asks of activations is in the mean over tokens of f f', where f holds the neurons of all adapters
side by side: the distances of equation 4's activation-based costs, the energy of a neuron's output, and the least
squares of the up projection (whose targets are linear in the activations). So no activations are kept, and what is
kept does not grow with the number of tokens.

The matrix is symmetric: only blocks on and right of the diagonal are stored. 8 adapters of 64 neurons at 24 sites take
29 MB in fp64 and half of that in fp32. Distances do with fp32; least squares want fp64.

Shapes: N tokens, R neurons of one adapter, M of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from peft_lightning.errors import UsageError

__all__ = ["Moments"]

_CHUNK = 2048  # tokens converted at a time, so that temporaries stay small in long batches


class Moments:
    """Count, sums and sums of products of features that arrive in batches.

    Args:
        sizes: number of neurons of each adapter.
        dtype: of products and sums.
        device: where the sums lie; None: where the first features come from.

    >>> moments = Moments([1, 1])
    >>> moments.add([torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [0.0]])])
    >>> moments.second().tolist(), moments.mean().tolist()
    ([[5.0, 1.0], [1.0, 2.0]], [2.0, 1.0])
    """

    def __init__(
        self, sizes: Sequence[int], dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> None:
        self.sizes = tuple(sizes)
        self.dtype = dtype
        self._ends = [0, *accumulate(self.sizes)]
        self._sums: list[Tensor] = []
        if device is not None:
            self._start(device)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return int(self._sums[0]) if self._sums else 0

    @property
    def nbytes(self) -> int:
        """Memory of the sums."""
        return sum(tensor.nbytes for tensor in self._sums)

    def sums(self) -> list[Tensor]:
        """The sums themselves, to be added up over ranks in place: count, first moments, blocks of products."""
        if not self._sums:
            self._start("cpu")
        return self._sums

    @torch.no_grad()
    def add(self, features: Sequence[Tensor], keep: Tensor | None = None) -> None:
        """Take in the features of a batch.

        Args:
            features: for each adapter ``[..., R]`` of any float dtype, all for the same tokens.
            keep: bool ``[...]``, False for padding; None: every token counts.

        Raises:
            UsageError: if shapes do not fit.
        """
        shapes = [tuple(part.shape) for part in features]
        wanted = [(*shapes[0][:-1], size) for size in self.sizes] if shapes else []
        if not shapes or shapes != wanted or (keep is not None and tuple(keep.shape) != shapes[0][:-1]):
            given = "" if keep is None else f" and a mask of shape {tuple(keep.shape)}"
            raise UsageError(f"features of shapes {shapes}{given}: must be of {self.sizes} neurons for the same tokens")
        if not self._sums:
            self._start(features[0].device)
        flat = [part.flatten(0, -2) if keep is None else part[keep] for part in features]
        for start in range(0, len(flat[0]), _CHUNK):
            features_NM = torch.cat([part[start : start + _CHUNK] for part in flat], 1).to(self._sums[1])
            self._sums[0] += len(features_NM)
            self._sums[1] += features_NM.sum(0)
            for block, (first, last) in zip(self._sums[2:], pairwise(self._ends), strict=True):
                block.addmm_(features_NM[:, first:last].t(), features_NM[:, first:])

    def second(self) -> Tensor:
        """Mean of f f', fp64 ``[M, M]``, on the CPU.

        Raises:
            UsageError: if there was no token.
        """
        starts = zip(self._blocks(), self._ends[:-1], strict=True)
        upper_MM = torch.cat([torch.nn.functional.pad(block, (first, 0)) for block, first in starts])
        upper_MM = upper_MM.triu() + upper_MM.triu(1).t()
        return upper_MM / self.count

    def mean(self) -> Tensor:
        """Mean of f, fp64 ``[M]``, on the CPU.

        Raises:
            UsageError: if there was no token.
        """
        self._blocks()
        return self._sums[1].cpu().double() / self.count

    def _blocks(self) -> list[Tensor]:
        if not self.count:
            raise UsageError("there are no activations: the data hold no token, or all of it is padding")
        return [block.cpu().double() for block in self._sums[2:]]

    def _start(self, device: torch.device | str) -> None:
        total = self._ends[-1]
        shapes = [(), (total,), *((last - first, total - first) for first, last in pairwise(self._ends))]
        dtypes = [torch.int64, *[self.dtype] * (len(shapes) - 1)]
        self._sums = [
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
