"""Prefixes come before keys and values, head by head, and every query sees them whatever the mask."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from peft_lightning.layers.prefix import Prefix


def test_extends_keys_and_values_head_by_head() -> None:
    torch.manual_seed(0)
    prefix = Prefix(6, 3)
    keys, values = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)
    long_keys, long_values = prefix.extend(keys, values)
    assert long_keys.shape == long_values.shape == (2, 2, 7, 3)
    for row in range(2):
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            assert_close(long_keys[row, head], torch.cat([prefix.prefix_key[:, part], keys[row, head]]))
            assert_close(long_values[row, head], torch.cat([prefix.prefix_value[:, part], values[row, head]]))


def test_a_mask_of_either_kind_hides_nothing_of_the_prefix() -> None:
    from transformers import AttentionInterface
    from transformers.models.bert.modeling_bert import BertConfig, BertModel

    from peft_lightning import AdapterConfig
    from peft_lightning.layers.adapters import attach_adapters

    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    model = BertModel(config, add_pooling_layer=False).eval()
    attach_adapters(model, AdapterConfig(kind="mam", bottleneck=3, init_std=1.0))
    attend = AttentionInterface()[config._attn_implementation]
    q, k, v = (torch.randn(1, 2, 4, 4) for _ in range(3))
    keep = torch.tensor([True, True, False, False]).expand(1, 1, 4, 4)
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~keep, -torch.inf)
    module = model.encoder.layer[0].attention.self
    with torch.no_grad():
        by_bool, by_sum = (attend(module, q, k, v, mask, scaling=0.5, dropout=0.0)[0] for mask in (keep, additive))
        alone = attend(module, q, k[:, :, :2], v[:, :, :2], None, scaling=0.5, dropout=0.0)[0]
    assert_close(by_sum, by_bool)
    assert_close(alone, by_bool)
