"""Scores of a few words by a backbone's head for masked language modelling, which stays as it is.

    scores = E_c n(a(W h + b)) + o_c

Symbols: ``h`` = the last layer's states, ``a`` = the head's nonlinearity, ``n`` = its LayerNorm, ``E_c`` [C, E] and
``o_c`` [C] = the rows of the output layer for C words. The other rows are never computed. MerA's prompts train 0.8 % of
the weights, which leaves none for the head; LM-BFF trains all. The rows stay even where a method trains the embeddings
that they are tied to.

Shapes: N sequences, L tokens, H width of the backbone, E of its embeddings, C words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lightning.backbones.build import BackboneConfig, build_masked_lm
from peft_lightning.backbones.options import plain_options
from peft_lightning.errors import UsageError

__all__ = ["WordHead"]

# model_type -> the dense map, the norm, the output layer, and the nonlinearity (None: the configuration's)
_PARTS: dict[str, tuple[str, str, str, str | None]] = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        None,
    ),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "gelu"),
    "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head", "gelu"),
}


class WordHead(nn.Module):
    """Map tokens' states to scores of C words, in float32 whatever the backbone computes in.

    The head's tensors are buffers that no checkpoint holds: they come from where the backbone comes from, a folder, the
    hub, or, like a random backbone's own, a seed. Nothing here trains.

    Args:
        backbone: a bare encoder.
        words: tokens of the words.

    Raises:
        UsageError: the architecture's head is not known, or the backbone's folder has none.
    """

    def __init__(self, backbone: nn.Module, words: Sequence[int]) -> None:
        super().__init__()
        config: Any = backbone.config
        if config.model_type not in _PARTS:
            allowed = ", ".join(_PARTS)
            raise UsageError(f"backbone of type {config.model_type!r}: words can be read out with {allowed} only")
        name = config._name_or_path
        origin = (
            BackboneConfig(name=name, revision=getattr(config, "_commit_hash", None))
            if name
            else BackboneConfig(config=plain_options(config))
        )
        model = build_masked_lm(origin, new_head=not name)
        dense, norm, output, activation = _PARTS[config.model_type]
        from transformers.activations import ACT2FN

        self._activation: Any = ACT2FN[activation or config.hidden_act]
        rows = torch.tensor(list(words))
        tensors = {part: model.get_submodule(path) for part, path in (("dense", dense), ("norm", norm))}
        for part, module in tensors.items():
            for kind in ("weight", "bias"):
                self._keep(f"{part}_{kind}", module.get_parameter(kind))
        decoder: Any = model.get_submodule(output)
        # Of a backbone that has no file, the random model made here knows other embeddings.
        tied = not name and config.tie_word_embeddings
        embeddings: Any = backbone
        weight_VE = embeddings.get_input_embeddings().weight if tied else decoder.weight
        self._keep("words_weight", weight_VE[rows.to(weight_VE.device)])
        self._keep("words_bias", decoder.bias[rows])
        self._eps = float(getattr(tensors["norm"], "eps", 0.0))

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.detach().clone().float(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores [N, L, C] in float32 for ``hidden`` [N, L, H] of any dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            part = self.get_buffer
            states = hidden.to(part("dense_weight").dtype)
            states = self._activation(F.linear(states, part("dense_weight"), part("dense_bias")))
            states = F.layer_norm(states, states.shape[-1:], part("norm_weight"), part("norm_bias"), self._eps)
            return F.linear(states, part("words_weight"), part("words_bias"))
