"""A model's folder is looked through before transformers reads it: sizes, code, and other folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lightning.backbones.build import BackboneConfig, build_backbone
from peft_lightning.backbones.folders import check_folder
from peft_lightning.errors import UsageError

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "albert": {"model_type": "albert", "embedding_size": 8, "num_hidden_layers": 6},
    "distilbert": {"model_type": "distilbert", "dim": 24, "n_heads": 2, "n_layers": 2, "hidden_dim": 32},
    "llama": {"model_type": "llama", "max_position_embeddings": 131072},
}
SMALL = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}


def folder(path: Path, shape: dict[str, Any]) -> Path:
    """A small model, as transformers writes it."""
    config = {**SMALL, **shape} if shape["model_type"] != "distilbert" else shape
    model: Any = build_backbone(BackboneConfig(config=config, tokenizer="toy"))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_what_transformers_writes_is_read(name: str, tmp_path: Path) -> None:
    check_folder(str(folder(tmp_path / "x", SHAPES[name])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 2_000_000}, "its sizes need 48,"),
        ({"type_vocab_size": 40_000_000}, "its sizes need 960,"),
        ({"num_hidden_layers": 4096}, "its sizes need 3,"),
        ({"vocab_size": 50_000_000}, "its sizes need 1,200,"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers = 5000: must be up to 4096"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation = someone/kernel: must be null, eager"),
        ({"_attn_implementation": "someone/kernel@refs/pr/1"}, "_attn_implementation = someone/kernel@refs"),
        ({"text_config": {"_attn_implementation": "someone/kernel"}}, "_attn_implementation = someone/kernel"),
        ({"model_type": "ernie", "max_position_embeddings": 20_000_000}, "max_position_embeddings = 20000000: must be"),
        ({"text_config": {"num_hidden_layers": 5000}}, "num_hidden_layers = 5000: must be up to 4096"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan: must be finite"),
        *(
            ({name: count}, f"{name} = {count}: must be at least 1")
            for name in ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layers", "n_layer", "num_layers")
            for count in (0, -1)
        ),
        ({"num_decoder_layers": 0}, "num_decoder_layers = 0: must be at least 1"),
        ({"num_hidden_groups": 0}, "num_hidden_groups = 0: must be at least 1"),
        ({"transformers_weights": "../x.bin"}, "transformers_weights: names a file"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights are not read"),
    ],
)
def test_what_a_configuration_may_not_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "x", SHAPES["bert"])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        check_folder(str(path))
    with pytest.raises(UsageError, match=message):
        build_backbone(BackboneConfig(name=str(path)))


def test_a_recorded_configuration_is_bounded_too() -> None:
    for changes in ({"num_hidden_layers": 20_000}, {"max_position_embeddings": 10_000_000}):
        config = {**SMALL, "model_type": "bert", **changes}
        with pytest.raises(UsageError, match=f"{next(iter(changes))} = .*: must be up to"):
            build_backbone(BackboneConfig(config=config, tokenizer="toy"))


def test_pickles_are_looked_through_whatever_lies_beside_them(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", SHAPES["bert"])
    state = build_backbone(BackboneConfig(name=str(path), tokenizer="toy")).state_dict()
    (path / "model.safetensors").unlink()
    (path / "decoy.safetensors").touch()
    (path / "padding.bin").write_bytes(bytes(1 << 20))
    torch.save(state, path / "pytorch_model.bin")
    check_folder(str(path))
    for name, index in (("pytorch_model.bin", False), ("other.bin", True)):
        (path / "pytorch_model.bin").unlink(missing_ok=True)
        (path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
        if index:
            text = json.dumps({"metadata": {}, "weight_map": {"a": name}})
            (path / "pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(ValueError, match="pytorch_model"):
            check_folder(str(path))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.bin"}}))
    with pytest.raises(ValueError, match="names 'other.bin', which does not end in .safetensors"):
        check_folder(str(path))


def test_a_tokenizer_of_another_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "x", SHAPES["bert"])
    (path / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["../tokenizer.4.0.json"]}))
    with pytest.raises(ValueError, match="tokenizer_config.json: fast_tokenizer_files: names other files"):
        check_folder(str(path))


def test_an_adapter_beside_the_model(tmp_path: Path) -> None:
    """transformers would read the model that the adapter names, if PEFT is installed."""
    path = folder(tmp_path / "x", SHAPES["bert"])
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match=r"adapter_config.json: is an adapter's"):
        check_folder(str(path))
