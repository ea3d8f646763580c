"""Backbones from configurations and folders, their fingerprints, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from peft_lightning.backbones.build import BackboneConfig, build_backbone, build_masked_lm, fingerprint
from peft_lightning.backbones.families import FAMILIES, family_of
from peft_lightning.backbones.pooling import pooling
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.backbones.toy import toy_tokenizer
from peft_lightning.errors import CheckpointError, UsageError
from peft_lightning.files.strict import check_fingerprint
from tests.families import DECODERS, backbone_setting
from tests.toy import TINY


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(**{**TINY, **options}))


def test_bfloat16_is_for_parameters() -> None:
    """Rotary frequencies stay what they are, as in a pretrained model."""
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    one, other = (
        build_backbone(BackboneConfig(tokenizer="toy", dtype=dtype, config=config)) for dtype in ("float32", "bfloat16")
    )
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    buffers = zip(one.named_buffers(), other.named_buffers(), strict=True)
    assert all(torch.equal(buffer, held) for (_, buffer), (_, held) in buffers)


def test_random_backbone_has_no_pooler_and_fits_the_tokenizer() -> None:
    backbone = build()
    assert backbone.pooler is None
    assert backbone.config.vocab_size >= len(toy_tokenizer()) and backbone.config.vocab_size % 8 == 0
    assert backbone.training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_loads_to_the_same_weights_in_both_dtypes(folder: Path) -> None:
    random = build()
    for dtype in ("float32", "bfloat16"):
        loaded = build_backbone(BackboneConfig(name=str(folder), dtype=dtype))
        assert fingerprint(loaded) == fingerprint(random)
        assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert load_tokenizer(str(folder))("the cat")["input_ids"] == toy_tokenizer()("the cat")["input_ids"]


def test_a_folder_that_lacks_weights_is_refused(folder: Path) -> None:
    deeper = BertConfig.from_pretrained(folder)
    deeper.num_hidden_layers = 3
    deeper.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"lack 16 tensors of the encoder: encoder\.layer\.2"):
        build_backbone(BackboneConfig(name=str(folder)))


@pytest.mark.parametrize("layers", [1, 0, -1])
@pytest.mark.parametrize("head", [False, True])
def test_a_folder_that_has_blocks_beyond_its_configuration_is_refused(head: bool, layers: int, folder: Path) -> None:
    """What would be left of it is another model."""
    if head:
        BertForMaskedLM(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    build_backbone(BackboneConfig(name=str(folder)))
    if head:
        build_masked_lm(BackboneConfig(name=str(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for make in (build_backbone, build_masked_lm):
        with pytest.raises(UsageError, match=r"cannot be built \(.*(blocks that it does not build|num_hidden_layers)"):
            make(BackboneConfig(name=str(folder)))


def test_the_fingerprint_sees_weights_and_shape(folder: Path) -> None:
    one, other = build(), build()
    with torch.no_grad():
        other.embeddings.word_embeddings.weight[0, 0] += 1
    assert fingerprint(one)["weights"] != fingerprint(other)["weights"]
    deeper = build(config={**TINY["config"], "num_hidden_layers": 3})
    assert fingerprint(deeper)["num_hidden_layers"] == 3


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "deberta-v2", "distilbert"])
def test_other_encoders_can_be_built(model_type: str) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    if model_type == "distilbert":
        small = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    backbone = build(config={"model_type": model_type, "pad_token_id": 0, **small})
    ids = torch.tensor([[2, 6, 7, 3]])
    assert backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape == (1, 4, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": None, "config": None}, "give either name .* or config"),
        ({"name": "x"}, "give either name .* or config"),
        ({"dtype": "float16"}, r"dtype = 'float16': must be one of float32, bfloat16"),
        ({"attention": "flash"}, "must be auto, sdpa or eager"),
        ({"config": {"hidden_size": 8}}, "model_type is missing"),
        ({"tokenizer": None}, r"backbone\.tokenizer: a backbone made from config needs one"),
        ({"config": {"model_type": "nosuch"}}, "cannot be built"),
        (
            {"config": {"model_type": "bert", "hiden_size": 32}},
            "'hiden_size' is no option of bert",
        ),
        ({"config": {"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}}, "cannot be built"),
        (
            {"config": {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}},
            "num_key_value_heads = 32 must divide num_attention_heads = 4",
        ),
        (
            {"config": {"model_type": "bart", "d_model": 64, "encoder_attention_heads": 3}},
            "num_attention_heads = 3 must divide hidden_size = 64",
        ),
        ({"name": "/no/such/folder", "config": None}, r"backbone\.name = '/no/such/folder': cannot be built"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_a_tokenizer_without_padding_token(tmp_path: Path) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=toy_tokenizer().backend_tokenizer)
    plain.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has neither padding nor end token"):
        load_tokenizer(str(tmp_path))
    plain.eos_token = "[SEP]"
    plain.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "[SEP]"


def test_an_unknown_tokenizer() -> None:
    with pytest.raises(UsageError, match="'/no/such/folder': its tokenizer cannot be loaded, there is no such folder"):
        load_tokenizer("/no/such/folder")


def test_families() -> None:
    for family in FAMILIES:
        assert pooling(AutoConfig.for_model(family)) == ("last" if family in DECODERS else "first")
    assert {pooling(AutoConfig.for_model(kind)) for kind in ("gpt2", "mistral", "opt", "gemma", "t5")} == {"last"}
    assert {pooling(AutoConfig.for_model(kind)) for kind in ("distilbert", "albert", "modernbert")} == {"first"}
    assert pooling(AutoConfig.for_model("bert", is_decoder=True)) == "last"
    with pytest.raises(UsageError, match="'gpt2': adapters and pruning know their way in bert, roberta"):
        family_of("gpt2")


def test_a_tokenizer_has_the_revision_of_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def from_pretrained(name: str, revision: str | None = None, **options: Any) -> Any:
        asked.append((name, revision))
        return toy_tokenizer()

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    for revision, tokenizer in (("abc", None), (None, None), ("abc", "org/other")):
        config = BackboneConfig(name="org/model", revision=revision, tokenizer=tokenizer)
        load_tokenizer(config.tokenizer_name)
    assert asked == [("org/model", "abc"), ("org/model", None), ("org/other", None)]


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("bart", "decoder_layers", 2),
        ("bart", "encoder_ffn_dim", 64),
        ("llama", "num_key_value_heads", 2),
        ("electra", "embedding_size", 16),
    ],
)
def test_the_fingerprint_names_what_differs_in_shape(family: str, option: str, value: int) -> None:
    setting = backbone_setting(family)
    here = fingerprint(build_backbone(BackboneConfig(**setting)))
    other = fingerprint(build_backbone(BackboneConfig(**{**setting, "config": {**setting["config"], option: value}})))
    with pytest.raises(CheckpointError, match=f"belongs to another backbone .*{option} .* here {value}"):
        check_fingerprint(here, other, "file")
