"""Folders of transformers are looked through before transformers reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_lightning.backbones.tokenizer_json import check_tokenizer
from peft_lightning.errors import first_line
from peft_lightning.reading.json_text import parse_json
from peft_lightning.reading.limits import file_inside, read_bytes, regular_size
from peft_lightning.reading.pickled import check_pickled

__all__ = ["check_folder", "check_left_over", "check_sizes"]

# More layers than any model has: they would be built before anything is compared.
_MOST_LAYERS = 4096
_MOST = 1 << 26
# Places that are learned; those that are computed take no memory.
_MOST_PLACES = 1 << 21
_COMPUTED = ("llama", "qwen2", "qwen3", "mistral")
_SIZES = re.compile("size|layers|heads|dim|ffn|width|d_model|position")
# With places that are learned, and so of as many weights as there are; others compute them.
_PLACED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "albert", "gpt2", "opt")
# Numbers of blocks, as architectures call them.
_BLOCKS = re.compile("(num_hidden|num_decoder|num|encoder|decoder|n)_layers?|num_hidden_groups")
_SHARED = ("albert",)  # all layers are one
# Other names are those of code on the hub.
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2")
# What transformers opens, and what of it is small and decides what is built.
_READ = (".json", ".txt", ".model", ".safetensors", ".bin", ".jinja")
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_NUMBER = re.compile(r"\.\d+\.")
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
                    check_sizes(content)
                    _check_weights(content, folder)
                elif path.name == "tokenizer_config.json":
                    _check_files(content)
                elif path.name.endswith(".index.json"):
                    _check_index(folder, content, ".bin" if path.name.startswith("pytorch_model") else ".safetensors")
            elif path.match("tokenizer*.json"):
                check_tokenizer(parse_json(read_bytes(path), once=False))
            elif path.match("pytorch_model*.bin") and not any((folder / name).exists() for name in _SAFE):
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
        if key == "transformers_weights" and value is not None:
            raise ValueError("transformers_weights: names a file; the weights are in the usual ones")
        if key == "quantization_config" and value is not None:
            raise ValueError("quantization_config: quantised weights are not read")
        if isinstance(value, dict):
            _check_code(value)


def check_sizes(content: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, before it is built.

    Args:
        content: options of a configuration of transformers, with those within.

    Raises:
        ValueError: names the option and what is allowed.
    """
    places = _MOST if content.get("model_type") in _COMPUTED else _MOST_PLACES
    for key, value in content.items():
        most = _MOST_LAYERS if "layers" in key else places if "position" in key else _MOST
        if isinstance(value, Mapping):
            check_sizes(value)
        elif type(value) is int and _SIZES.search(str(key)) and not -1 <= value <= most:
            raise ValueError(f"{key} = {str(value)[:40]}: must be up to {most}")
        elif type(value) is int and _BLOCKS.fullmatch(str(key)) and value < 1:
            raise ValueError(f"{key} = {value}: must be at least 1")
        elif type(value) is float and not math.isfinite(value):
            raise ValueError(f"{key} = {value}: must be finite")


def check_left_over(names: Iterable[str], built: Iterable[str], prefix: str) -> None:
    """Refuse weights of blocks beyond those that were built: a configuration of fewer blocks is another model's.

    Args:
        names: of the weights that were not read; heads of other tasks may be among them.
        built: names of those that the model has.
        prefix: under which a model with a head has the names of one without.

    Raises:
        ValueError: names the first one.
    """

    def place(name: str) -> str:
        return _NUMBER.sub(".0.", name.removeprefix(f"{prefix}."))

    places = {place(name) for name in built if _NUMBER.search(name)}
    if beyond := sorted(name for name in names if _NUMBER.search(name) and place(name) in places):
        raise ValueError(f"its weights have {len(beyond)} tensors of blocks that it does not build: {beyond[0]}")


def _check_weights(content: dict[str, Any], folder: Path) -> None:
    """No widths of more weights than the files beside have bytes."""
    numbers = {key: value for key, value in content.items() if type(value) is int}
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


def _check_index(folder: Path, content: Any, suffix: str) -> None:
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise ValueError("has no mapping weight_map")
    for name in sorted({str(name) for name in names.values()}):
        if not name.endswith(suffix):
            raise ValueError(f"names {name[:60]!r}, which does not end in {suffix}")
        file = file_inside(folder, name)
        if suffix == ".bin" and not any((folder / safe).exists() for safe in _SAFE):
            check_pickled(file)


def _check_files(content: Any) -> None:
    if isinstance(content, dict) and content.get("fast_tokenizer_files") is not None:
        raise ValueError("fast_tokenizer_files: names other files; tokenizer.json is the one that is read")
