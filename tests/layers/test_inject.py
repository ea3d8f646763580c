"""Injection changes what it says and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from peft_lightning.errors import UsageError
from peft_lightning.layers.bottleneck import Bottleneck
from peft_lightning.layers.inject import inject, select_sites

SITES = ["encoder.layer.0.attention.output", "encoder.layer.0.output", "encoder.layer.1.attention.output"]


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config, add_pooling_layer=False).eval()


def test_equals_a_hand_written_houlsby_layer() -> None:
    model = bert()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.encoder.layer[0]
    injection = inject(model, SITES[:2], "dropout", "one", lambda: Bottleneck(16, 4, init_std=0.5))
    first, second = injection.adapters.values()
    hidden = torch.randn(2, 5, 16)
    with torch.no_grad():
        context = layer.attention.self(hidden)[0]
        h = first(layer.attention.output.dense(context))
        h = layer.attention.output.LayerNorm(h + hidden)
        inner = layer.intermediate(h)
        expected = layer.output.LayerNorm(second(layer.output.dense(inner)) + h)
        got = layer(hidden)
    assert_close(got, expected)
    for name, tensor in plain.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert set(injection.adapters) == {f"{site}.adapters.one" for site in SITES[:2]}
    new = set(model.state_dict()) - set(plain)
    assert "encoder.layer.0.output.adapters.one.adapter_down.0.weight" in new
    assert "2 adapters" in injection.describe()


def test_survives_fullgraph_compilation() -> None:
    model = bert()
    inject(model, SITES, "dropout", "one", lambda: Bottleneck(16, 4, init_std=0.5))
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.ones_like(ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert_close(compiled(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


def test_select_sites() -> None:
    assert select_sites(SITES, r"layer\.0\.") == SITES[:2]
    with pytest.raises(UsageError, match=r"target = 'decoder' matches no site; there are: encoder\.layer\.0"):
        select_sites(SITES, "decoder")
    with pytest.raises(UsageError, match="not a regular expression"):
        select_sites(SITES, "(")


def test_names() -> None:
    model: nn.Module = bert()
    inject(model, SITES, "dropout", "one", lambda: Bottleneck(16, 4))
    with pytest.raises(UsageError, match="already has an adapter"):
        inject(model, SITES, "dropout", "one", lambda: Bottleneck(16, 4))
    with pytest.raises(UsageError, match="must be an identifier"):
        inject(model, SITES, "dropout", "a.b", lambda: Bottleneck(16, 4))
