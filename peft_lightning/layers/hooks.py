"""Where in a backbone something adds to its hidden states: the hooks of bottleneck adapters and their like.

The places are those of layers/bottleneck. A layer says in :meth:`SiteLayer.plus` what it adds; the hooks here tie it to
a place, all of them bound methods, so that ``copy.deepcopy`` rebinds them to the copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

__all__ = ["SiteLayer"]


class SiteLayer(nn.Module, ABC):
    """Base of the layers that add something to the hidden states at one site. Shapes: B batch, L tokens, D width."""

    def __init__(self) -> None:
        super().__init__()
        self._remembered: Tensor | None = None

    @abstractmethod
    def plus(self, base_BLD: Tensor, input_BLD: Tensor) -> Tensor:
        """``[B, L, D]``, the dtype of the base: the base plus what the layer makes of its input."""

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook, sequential."""
        return self.plus(output, output)

    def around_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """Forward hook of a LayerNorm: normalises once more, with the layer's output in the sum."""
        return module.forward(self.plus(args[0], output))

    def beside(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook, parallel: what went in takes a second way."""
        return self.plus(output, args[0])

    def beside_residual(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook, parallel, of BERT's ``output(hidden_states, input_tensor)``: the second is the residual."""
        return (args[0], self.plus(args[1], args[1]), *args[2:])

    def remember(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a feed-forward block's first map, where no module spans the block."""
        self._remembered = args[0]

    def beside_remembered(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the block's last map, parallel."""
        assert self._remembered is not None
        input_BLD, self._remembered = self._remembered, None
        return self.plus(output, input_BLD)
