"""Words read out by a backbone's own head: the scores of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from peft_lightning.backbones.build import BackboneConfig, build_backbone, build_masked_lm
from peft_lightning.errors import UsageError
from peft_lightning.layers.word_head import WordHead

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
    "initializer_range": 0.5,
}
WORDS = [7, 3, 41]


def saved(folder: Path, **options: Any) -> tuple[Any, Any]:
    """A random model with its head, biases and norms too, and the bare model of its folder, both without dropout."""
    model: Any = build_masked_lm(BackboneConfig(config={**SMALL, **options}))
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model.eval(), build_backbone(BackboneConfig(name=str(folder))).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bert"},
        {"model_type": "bert", "hidden_act": "relu", "layer_norm_eps": 0.1},
        {"model_type": "roberta"},
        {"model_type": "electra", "embedding_size": 8},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_scores_are_those_of_the_whole_model(options: dict[str, Any], tmp_path: Path) -> None:
    model, backbone = saved(tmp_path, **options)
    head = WordHead(backbone, WORDS)
    ids = torch.randint(5, 60, (3, 9))
    with torch.no_grad():
        scores = head(backbone(ids).last_hidden_state)
        assert_close(scores, model(ids).logits[..., WORDS], rtol=1e-5, atol=1e-4)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.1
    assert head(torch.randn(2, 4, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_nothing_of_it_trains_or_is_kept(tmp_path: Path) -> None:
    _, backbone = saved(tmp_path, model_type="bert")
    head = WordHead(backbone, WORDS)
    assert not list(head.parameters()) and not head.state_dict()
    assert {buffer.dtype for buffer in head.buffers()} == {torch.float32}
    hidden = torch.randn(2, 4, 16, requires_grad=True)
    head(hidden).sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_a_random_backbone_has_a_random_head_with_its_own_words() -> None:
    backbone: Any = build_backbone(BackboneConfig(config={**SMALL, "model_type": "bert"}))
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(WordHead(backbone, WORDS))
    assert_close(dict(heads[0].named_buffers()), dict(heads[1].named_buffers()), rtol=0, atol=0)
    assert_close(heads[0].get_buffer("words_weight"), backbone.embeddings.word_embeddings.weight[WORDS])


def test_a_folder_without_the_head(tmp_path: Path) -> None:
    backbone: Any = build_backbone(BackboneConfig(config={**SMALL, "model_type": "bert"}))
    backbone.save_pretrained(tmp_path)
    bare = build_backbone(BackboneConfig(name=str(tmp_path)))
    with pytest.raises(UsageError, match="cannot be read out with words .its weights lack . tensors of the head for"):
        WordHead(bare, WORDS)


@pytest.mark.real_data
def test_the_real_encoder_has_no_head(encoder: str) -> None:
    with pytest.raises(UsageError, match="cannot be read out with words"):
        WordHead(build_backbone(BackboneConfig(name=encoder)), WORDS)


def test_an_unknown_head() -> None:
    backbone = build_backbone(BackboneConfig(config={**SMALL, "model_type": "deberta-v2"}))
    with pytest.raises(
        UsageError, match="backbone of type 'deberta-v2': words can be read out with bert, roberta, ele"
    ):
        WordHead(backbone, WORDS)
