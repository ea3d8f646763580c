"""Folders of transformers are looked through before transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_lightning.reading.limits import file_inside, parse_json, read_bytes, regular_size
from peft_lightning.reading.pickled import check_pickled

__all__ = ["check_folder"]

# More layers than any model has: they would be built before anything is compared.
_MOST_LAYERS = 4096
_MOST = 1 << 26


def check_folder(name: str | None) -> None:
    """Look through the configuration, the index of the weights and pickled weights of a folder.

    Args:
        name: a folder; anything else is passed over.

    Raises:
        ValueError: something in it is damaged, claims more than it has, or leads out of the folder; says what.
        OSError: a file cannot be read.
    """
    if name is None or not (folder := Path(name)).is_dir():
        return
    for path in sorted(folder.glob("*.json")):
        try:
            content = parse_json(read_bytes(path))
            if path.name == "config.json":
                _check_numbers(content, folder)
            if path.name.endswith(".index.json"):
                _check_index(folder, content)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
    if not list(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("*.bin")):
            try:
                check_pickled(path)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from None


def _check_numbers(content: Any, folder: Path) -> None:
    """Layers as there may be, and no widths of more weights than the files beside have bytes."""
    if not isinstance(content, dict):
        raise ValueError("holds no mapping")
    numbers = {key: value for key, value in content.items() if type(value) is int}
    for key, value in numbers.items():
        most = _MOST_LAYERS if "layers" in key else _MOST
        if not -1 <= value <= most and "max" not in key:
            raise ValueError(f"{key} = {str(value)[:40]}: must be up to {most}")
    files = [path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}")]
    width = numbers.get("hidden_size", numbers.get("d_model", 1))
    words = numbers.get("vocab_size", 1) * numbers.get("embedding_size", width)
    wide = width * max(numbers.get("intermediate_size", 1), numbers.get("encoder_ffn_dim", 1), width)
    there = sum(regular_size(path) for path in files)
    if files and words + wide > there:
        raise ValueError(f"its sizes need {words + wide:,} weights at least; the files beside it have {there:,} bytes")


def _check_index(folder: Path, content: Any) -> None:
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise ValueError("has no mapping weight_map")
    for name in sorted({str(name) for name in names.values()}):
        file_inside(folder, name)
