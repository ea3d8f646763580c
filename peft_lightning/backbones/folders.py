"""Folders of transformers are looked through before transformers reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft_lightning.backbones.tokenizer_json import check_tokenizer
from peft_lightning.errors import first_line
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import file_inside, read_bytes, regular_size
from peft_lightning.reading.pickled import check_pickled

__all__ = ["check_folder"]

# More layers than any model has: they would be built before anything is compared.
_MOST_LAYERS = 4096
_MOST = 1 << 26
_SIZES = re.compile("size|layers|heads|dim|ffn|width|d_model")
# With places that are learned, and so of as many weights as there are; others compute them.
_PLACED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "albert", "gpt2", "opt")
_SHARED = ("albert",)  # all layers are one
# Other names are those of code on the hub.
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2")
# What transformers opens, and what of it is small and decides what is built.
_READ = (".json", ".txt", ".model", ".safetensors", ".bin", ".jinja")
_PARSED = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def check_folder(name: str | None) -> None:
    """Look through the configuration, the tokenizer, the index of the weights and pickled weights of a folder.

    Args:
        name: a folder; anything else is passed over.

    Raises:
        ValueError: something in it is damaged, claims more than it has, or leads out of the folder; says what.
    """
    if name is None or not (folder := Path(name)).is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            if path.name == "adapter_config.json":
                raise ValueError("is an adapter's, and another model than the folder's would be read")
            if path.suffix in _READ:
                regular_size(path)  # a pipe would keep whoever opens it waiting
            if path.name in _PARSED or path.name.endswith(".index.json"):
                content = parse_json(read_bytes(path))
                if path.name == "config.json":
                    _check_code(content)
                    _check_numbers(content, folder)
                elif path.name.endswith(".index.json"):
                    _check_index(folder, content)
            elif path.name == "tokenizer.json":
                check_tokenizer(parse_json(read_bytes(path), once=False))
            elif path.match("pytorch_model*.bin") and not list(folder.glob("*.safetensors")):
                check_pickled(path)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        except OSError as error:
            raise ValueError(f"{path.name}: {first_line(error)}") from None


def _check_code(content: Any) -> None:
    """Nothing that has transformers fetch code, or unpack weights in a way of its own; also not further inside."""
    if not isinstance(content, dict):
        raise ValueError("holds no mapping")
    for key, value in content.items():
        if key.strip("_").startswith("attn_implementation") and value not in _ATTENTIONS:
            raise ValueError(f"{key} = {str(value)[:60]}: must be null, eager, sdpa or flash_attention_2")
        if key == "quantization_config" and value is not None:
            raise ValueError("quantization_config: quantised weights are not read")
        if isinstance(value, dict):
            _check_code(value)


def _check_numbers(content: dict[str, Any], folder: Path) -> None:
    """Layers as there may be, and no widths of more weights than the files beside have bytes."""
    numbers = {key: value for key, value in content.items() if type(value) is int}
    for key, value in numbers.items():
        most = _MOST_LAYERS if "layers" in key else _MOST
        if _SIZES.search(key) and not -1 <= value <= most:
            raise ValueError(f"{key} = {str(value)[:40]}: must be up to {most}")
    files = [path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}")]
    width = numbers.get("hidden_size", numbers.get("d_model", 1))
    within = numbers.get("embedding_size", width)
    rows = numbers.get("vocab_size", 1) + numbers.get("type_vocab_size", 0)
    if content.get("model_type") in _PLACED:
        rows += numbers.get("max_position_embeddings", numbers.get("n_positions", 0))
    wide = width * max(numbers.get("intermediate_size", 1), numbers.get("encoder_ffn_dim", 1), width)
    layers = 1 if content.get("model_type") in _SHARED else max(1, numbers.get("num_hidden_layers", 1))
    needed, there = rows * within + layers * wide, sum(regular_size(path) for path in files)
    if files and needed > there:
        raise ValueError(f"its sizes need {needed:,} weights at least; the files beside it have {there:,} bytes")


def _check_index(folder: Path, content: Any) -> None:
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise ValueError("has no mapping weight_map")
    for name in sorted({str(name) for name in names.values()}):
        file_inside(folder, name)
