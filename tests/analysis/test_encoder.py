"""Vectors of frozen backbones: every layer, whatever the order and the padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from peft_lightning.analysis.encoder import FrozenEncoder, pool
from peft_lightning.backbones.toy import TOY_VOCABULARY, toy_tokenizer
from peft_lightning.errors import UsageError

TEXTS = ["the cat sleeps", "this red dog is not lazy", "fish", "the tiny horse looks brave"]


def folder(path: Path, kind: str = "bert", auto: Any = AutoModel, **options: Any) -> str:
    """A folder with a small random model and the toy tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bart":
        sizes = {
            **{"d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        }
    limit = {"vocab_size": len(TOY_VOCABULARY), "max_position_embeddings": 40, "pad_token_id": 0}
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(kind, **{**sizes, **limit, **options})).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "bart"])
def test_every_layer_of_every_text(kind: str, pooling: str, tmp_path: Path) -> None:
    encoder = FrozenEncoder(folder(tmp_path, kind), batch_size=3)
    assert encoder.depth == 3
    found: dict[int, torch.Tensor] = {}
    for numbers, vectors_LND in encoder.layers(TEXTS, pooling):
        assert len(numbers) <= 3 and not vectors_LND.requires_grad
        found |= dict(zip(numbers, vectors_LND.unbind(1), strict=True))
    for number, text in enumerate(TEXTS):  # one text at a time: no padding
        ids = toy_tokenizer()(text, return_tensors="pt")["input_ids"]
        states = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.stack([s[0].mean(0) if pooling == "mean" else s[0, 0] for s in states])
        assert expected.shape == (4, 16)
        torch.testing.assert_close(found[number], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(TEXTS, pooling)[1], found[1][-1])


def test_a_folder_with_a_head_is_the_same_backbone(tmp_path: Path) -> None:
    name = folder(tmp_path, auto=AutoModelForMaskedLM)
    encoder = FrozenEncoder(name)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters()) and not encoder.model.training
    whole = AutoModelForMaskedLM.from_pretrained(name).eval()
    inputs = toy_tokenizer()(TEXTS[:1], return_tensors="pt")
    expected = whole(**inputs, output_hidden_states=True).hidden_states[-1].mean(1)
    torch.testing.assert_close(encoder.encode(TEXTS[:1]), expected.detach(), atol=1e-5, rtol=1e-5)


def test_texts_are_cut(tmp_path: Path) -> None:
    encoder = FrozenEncoder(folder(tmp_path), max_length=4)
    torch.testing.assert_close(encoder.encode(["the cat sleeps"]), encoder.encode(["the cat runs and runs"]))
    assert FrozenEncoder(str(tmp_path)).max_length == 40  # as many as it has positions for
    with pytest.raises(UsageError, match="max_length = 41: must be from 3 to 40"):
        FrozenEncoder(str(tmp_path), max_length=41)
    # RoBERTa's first position comes after the padding's
    assert FrozenEncoder(folder(tmp_path / "roberta", "roberta", pad_token_id=1)).max_length == 38


def test_pool_leaves_padding_out() -> None:
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[50.0], [2.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0], [4.0]]
    assert pool(hidden, mask, "first").tolist() == [[1.0], [2.0]]


def test_refusals(tmp_path: Path) -> None:
    encoder = FrozenEncoder(folder(tmp_path))
    with pytest.raises(UsageError, match="pooling = 'max': must be one of mean, first"):
        next(encoder.layers(TEXTS, "max"))
    with pytest.raises(UsageError, match="batch_size = 0: must be at least 1"):
        FrozenEncoder(str(tmp_path), batch_size=0)
    with pytest.raises(UsageError, match="ghost"):
        FrozenEncoder(str(tmp_path / "ghost"))
    folder(tmp_path, vocab_size=8)
    with pytest.raises(UsageError, match=rf"its tokenizer has {len(TOY_VOCABULARY)} words, it embeds 8"):
        FrozenEncoder(str(tmp_path))
