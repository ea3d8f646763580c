"""Backbones that are only read: texts in, one vector per text and layer out.

Shapes: N texts, L tokens of the longest text of a batch, D width, l layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peft_lightning.backbones.build import BackboneConfig, build_backbone, fingerprint
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.errors import UsageError

__all__ = ["FrozenEncoder", "pool"]

_POOLINGS = ("mean", "first")


def pool(hidden_NLD: Tensor, mask_NL: Tensor, pooling: str) -> Tensor:
    """One vector per text: the mean over its tokens, special ones included, or the first token.

    Args:
        hidden_NLD: states of a layer.
        mask_NL: 1 for a token, 0 for padding.
        pooling: mean or first.

    Returns:
        fp32 [N, D].
    """
    if pooling == "first":
        return hidden_NLD[torch.arange(len(mask_NL), device=mask_NL.device), mask_NL.argmax(dim=1)].float()
    weights_NL1 = mask_NL.unsqueeze(-1).float()
    return (hidden_NLD.float() * weights_NL1).sum(dim=1) / weights_NL1.sum(dim=1).clamp_min(1)


class FrozenEncoder:
    """A backbone with its tokenizer, in evaluation mode and without gradients. Of an encoder-decoder, the encoder.

    Args:
        name: folder or hub name; a folder of a model with a head will do.
        max_length: tokens of a text at most, the rest is cut; by default as many as the backbone has positions for.
        batch_size: texts per forward pass.
        device: where it computes.

    Raises:
        UsageError: if it cannot be loaded, or a number does not fit.
    """

    def __init__(
        self, name: str, *, max_length: int | None = None, batch_size: int = 64, device: str | torch.device = "cpu"
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size = {batch_size}: must be at least 1")
        self.name, self.batch_size, self.device = name, batch_size, torch.device(device)
        config = BackboneConfig(name=name)
        self.tokenizer = load_tokenizer(config.tokenizer_name)
        model: Any = build_backbone(config)
        self.identity = fingerprint(model)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        embedded = cast(Tensor, model.get_input_embeddings().weight).shape[0]
        if len(self.tokenizer) > embedded:
            raise UsageError(f"backbone {name!r}: its tokenizer has {len(self.tokenizer)} words, it embeds {embedded}")
        self._known = inspect.signature(self.model.forward).parameters
        self.max_length = self._length(max_length)

    @property
    def depth(self) -> int:
        """How many layers it has, l."""
        return int(self.model.config.num_hidden_layers)

    def encode(self, texts: Sequence[str], pooling: str = "mean") -> Tensor:
        """The last layer's vectors, fp32 ``[N, D]`` on the CPU, in the order of the texts."""
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        for numbers, vectors_LND in self.layers(texts, pooling, last=True):
            for number, vector in zip(numbers, vectors_LND[0], strict=True):
                rows[number] = vector
        return torch.stack(rows)

    @torch.no_grad()
    def layers(
        self, texts: Sequence[str], pooling: str = "mean", *, last: bool = False
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield vectors batch by batch, texts of similar length together.

        Args:
            texts: at least one.
            pooling: mean or first.
            last: whether the last layer is enough.

        Yields:
            The numbers of a batch's texts, and fp32 ``[l + 1, n, D]`` on the CPU: the embeddings and every layer
            (``[1, n, D]`` with ``last``).

        Raises:
            UsageError: if ``pooling`` is neither of the two, or the backbone does not show its layers.
        """
        if pooling not in _POOLINGS:
            raise UsageError(f"pooling = {pooling!r}: must be one of {', '.join(_POOLINGS)}")
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            inputs = self.tokenizer(
                [texts[number] for number in numbers],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            known = {name: tensor for name, tensor in inputs.items() if name in self._known}
            output = self.model(**known, output_hidden_states=not last)
            hidden = (output.last_hidden_state,) if last else getattr(output, "hidden_states", None)
            if hidden is None:
                raise UsageError(f"backbone {self.name!r}: does not show the states of its layers")
            yield numbers, torch.stack([pool(states, inputs["attention_mask"], pooling) for states in hidden]).cpu()

    def _length(self, wanted: int | None) -> int:
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):  # RoBERTa counts positions from behind the padding's
            most = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        else:
            most = int(getattr(self.model.config, "max_position_embeddings", 0)) or 512
        if wanted is not None and not 3 <= wanted <= most:
            raise UsageError(
                f"max_length = {wanted}: must be from 3 to {most}, the positions of backbone {self.name!r}"
            )
        return min(most, self.tokenizer.model_max_length) if wanted is None else wanted
