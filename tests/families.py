"""Tiny random models of every architecture that adapters know, and what a batch for them looks like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_lightning.backbones.families import FAMILIES
from peft_lightning.layers.adapters import KINDS, refusal

_WIDTH: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_BERT: dict[str, Any] = {**_WIDTH, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "dropout": 0.0,
    "pad_token_id": 0,
}
_LLAMA: dict[str, Any] = {**_WIDTH, "num_key_value_heads": 1}
_DEBERTA: dict[str, Any] = {
    **_BERT,
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 8},
    "deberta-v2": _DEBERTA,
    "bart": _BART,
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
}
DECODERS = {"bart", "llama", "qwen2", "qwen3"}
CELLS = [(family, kind) for family in FAMILIES for kind in KINDS if refusal(family, kind) is None]
REFUSED = [(family, kind) for family in FAMILIES for kind in KINDS if refusal(family, kind) is not None]


def backbone_setting(family: str, **changes: Any) -> dict[str, Any]:
    """The setting of a tiny random backbone of an architecture."""
    return {"config": {"model_type": family, **OPTIONS[family]}, "tokenizer": "toy", **changes}


def inputs(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token numbers and a mask with padding at the end of all rows but the first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row :] = 0
        ids[row, length - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}
