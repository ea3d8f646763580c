"""Tokenizers: from a folder or the hub, and as plain text, so that a checkpoint carries the one it was trained with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lightning.backbones.folders import check_folder
from peft_lightning.backbones.options import pruned_folder
from peft_lightning.backbones.tokenizer_json import is_failure
from peft_lightning.errors import CheckpointError, UsageError, first_line

__all__ = ["load_tokenizer", "needs_spaces", "same_tokens", "tokenizer_files", "tokenizer_from_files"]


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a folder, a hub name (``name@revision`` for a revision), or the built-in ``toy`` one.

    Raises:
        UsageError: if it cannot be loaded or has no padding token.
    """
    if name == "toy":
        from peft_lightning.backbones.toy import toy_tokenizer

        return toy_tokenizer()
    from transformers import AutoTokenizer

    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UsageError(f"backbone {name!r}: its tokenizer cannot be loaded, there is no such folder")
    try:
        check_folder(name)
        # a folder's own name may hold the sign, a hub name cannot
        repository, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision or None, trust_remote_code=False)
        tokenizer("a b", "c")  # rules that do not go together show at the first text
    except BaseException as error:  # whatever a damaged file leads to, it means the same
        if not is_failure(error):
            raise
        reason = pruned_folder(name) or first_line(error)
        raise UsageError(f"backbone {name!r}: its tokenizer cannot be loaded ({reason})") from error
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens}:  # transformers makes one up for want of files
        raise UsageError(f"backbone.tokenizer = {name!r}: there are no files of a tokenizer; name one that has some")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # as usual for decoders; the attention mask tells them apart
    if tokenizer.pad_token_id is None:
        raise UsageError(f"backbone.tokenizer = {name!r}: has neither padding nor end token; batches cannot be padded")
    return tokenizer


def tokenizer_files(tokenizer: Any, length: int | None = None) -> dict[str, str]:
    """The files of a tokenizer: name -> text.

    Args:
        tokenizer: a tokenizer of transformers.
        length: tokens at most that its model reads, where that is less than what the tokenizer says.
    """
    before = tokenizer.model_max_length
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.model_max_length = before if length is None else min(before, length)
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.model_max_length = before
        return {
            path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir()) if _is_text(path)
        }


def tokenizer_from_files(files: Mapping[str, str]) -> Any:
    """The tokenizer again; no code among the files runs.

    Raises:
        CheckpointError: if the files do not make one.
    """
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                if Path(name).name != name or not _is_text(Path(name)):
                    raise ValueError(f"{name!r} is no file of a tokenizer")
                (Path(folder) / name).write_text(text, encoding="utf-8")
            check_folder(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer("a b", "c")
        for name in ("is_local", "local_files_only"):  # where it came from is no property of it
            tokenizer.init_kwargs.pop(name, None)
        return tokenizer
    except BaseException as error:  # whatever a damaged file leads to, it means the same
        if not is_failure(error):
            raise
        raise CheckpointError(f"the tokenizer in the checkpoint is damaged ({first_line(error)})") from error


def _is_text(path: Path) -> bool:
    return path.suffix in (".json", ".txt", ".jinja")


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every word the same number."""
    return bool(one.get_vocab() == other.get_vocab())


def needs_spaces(tokenizer: Any) -> bool:
    """Whether a word that is encoded apart from its sentence needs a space in front to be read as in a sentence.

    So it is with the tokenizers of GPT-2 and RoBERTa: they know by the space where a word begins, and add none.

    Raises:
        UsageError: if the tokenizer does not tell which word a token is of.
    """
    if not tokenizer.is_fast:
        name = tokenizer.name_or_path
        raise UsageError(f"tokenizer {name!r} is a {type(tokenizer).__name__}; allowed for lists of words: a fast one")
    inside, alone, spaced = (
        tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)["input_ids"][-1:]
        for text in ("a a", ["a"], [" a"])
    )
    return bool(alone != inside == spaced)
