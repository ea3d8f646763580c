"""Backbones: any encoder of transformers, from a folder, a hub name, or a configuration with random weights."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_lightning.checks import check_types
from peft_lightning.errors import UsageError

__all__ = ["BackboneConfig", "as_backbone_config", "build_backbone", "fingerprint", "load_tokenizer"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which encoder, and how it is held.

    Attributes:
        name: local folder or hub name of pretrained weights.
        config: instead of ``name``: ``model_type`` and options of a transformers configuration, for random weights.
        tokenizer: folder, hub name, or ``toy``; by default the backbone's own.
        revision: hub revision.
        dtype: of the backbone's weights, float32 or bfloat16; what a method adds stays float32.
        attention: auto (what transformers chooses for the architecture), sdpa or eager.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: run the backbone through torch.compile.

    Raises:
        UsageError: if a value is not allowed.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_types(self, "backbone")
        if (self.name is None) == (self.config is None):
            raise UsageError("backbone: give either name (a folder or hub name) or config (random weights)")
        if self.dtype not in DTYPES:
            raise UsageError(f"backbone.dtype = {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.attention not in ("auto", "sdpa", "eager"):
            raise UsageError(f"backbone.attention = {self.attention!r}: must be auto, sdpa or eager")
        if self.config is not None and "model_type" not in self.config:
            raise UsageError("backbone.config: model_type is missing (for instance bert)")
        if self.config is not None and self.tokenizer is None:
            raise UsageError("backbone.tokenizer: a backbone made from config needs one (a folder, a hub name, or toy)")

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's folder, hub name (with ``@revision`` where the backbone has one), or ``toy``."""
        return str(self.tokenizer_of(self.name, self.tokenizer, self.revision))

    @staticmethod
    def tokenizer_of(name: str | None, tokenizer: str | None, revision: str | None) -> str | None:
        """The tokenizer that goes with a backbone: the one named, or the backbone's own at the same revision."""
        return tokenizer or (f"{name}@{revision}" if name and revision else name)


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
        # a folder's own name may hold the sign, a hub name cannot
        repository, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        tokenizer = AutoTokenizer.from_pretrained(repository, revision=revision or None)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"backbone {name!r}: its tokenizer cannot be loaded ({_first_line(error)})") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # as usual for decoders; the attention mask tells them apart
    if tokenizer.pad_token_id is None:
        raise UsageError(f"backbone.tokenizer = {name!r}: has neither padding nor end token; batches cannot be padded")
    return tokenizer


def build_backbone(config: BackboneConfig) -> nn.Module:
    """Build the bare encoder (no pooler, no head) in training mode with all weights frozen or not as they come.

    Random weights use the current random state; the caller seeds it.

    Raises:
        UsageError: if the folder or name cannot be loaded, or the configuration is not accepted.
    """
    from transformers import AutoConfig, AutoModel

    try:
        if config.config is not None:
            options = dict(config.config)
            _check_options(options)
            if "vocab_size" not in options:
                options["vocab_size"] = _padded_vocabulary(load_tokenizer(config.tokenizer_name))
            hf_config = AutoConfig.for_model(**options)
        else:
            hf_config = AutoConfig.from_pretrained(config.name, revision=config.revision)
        _check_heads(hf_config)
        model_class = AutoModel._model_mapping[type(hf_config)]
        extra = {"add_pooling_layer": False} if _takes(model_class, "add_pooling_layer") else {}
        if getattr(hf_config, "use_cache", False):  # keys and values of earlier tokens serve generation only
            hf_config.use_cache = False
        if config.attention != "auto":
            hf_config._attn_implementation = config.attention
        if config.config is not None:
            backbone = model_class(hf_config, **extra).to(DTYPES[config.dtype])
        else:
            with _quiet():
                backbone, loading = model_class.from_pretrained(
                    config.name,
                    config=hf_config,
                    revision=config.revision,
                    dtype=DTYPES[config.dtype],
                    output_loading_info=True,
                    **extra,
                )
            if lacking := sorted(loading["missing_keys"]):
                raise ValueError(f"its weights lack {len(lacking)} tensors of the encoder: {', '.join(lacking[:3])}")
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        what = f"backbone.name = {config.name!r}" if config.name else f"backbone.config = {config.config}"
        raise UsageError(f"{what}: cannot be built ({_first_line(error)})") from error
    if config.gradient_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.compile:
        backbone.compile()
    return backbone.train()


def fingerprint(backbone: nn.Module) -> dict[str, Any]:
    """What identifies a backbone: its shape, and a digest over samples of every weight.

    The digest takes up to 64 evenly spaced entries per tensor, rounded to bfloat16, so that it is the same for a
    backbone held in float32 and in bfloat16 and costs milliseconds at any size. Call it before anything is attached.
    """
    config: Any = backbone.config
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    keys = (
        *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("num_key_value_heads", "head_dim", "embedding_size", "encoder_ffn_dim"),
        *("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads"),
    )
    shape = {key: getattr(config, key) for key in keys if hasattr(config, key)}
    return {**shape, "weights": digest.hexdigest()}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report on the pooler and heads that a bare encoder leaves out."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_options(options: Mapping[str, Any]) -> None:
    """A configuration takes any keyword; one that means nothing to it is a typing error."""
    from transformers import AutoConfig, AutoModel

    plain = AutoConfig.for_model(options["model_type"])
    known = {*plain.to_dict(), *getattr(plain, "attribute_map", {})}
    # Some options have no default in the configuration: the model asks whether they are there.
    source = inspect.getsource(sys.modules[AutoModel._model_mapping[type(plain)].__module__])
    known |= set(re.findall(r'getattr\(config, "(\w+)"', source))
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise ValueError(f"{name!r} is no option of {options['model_type']}; near it: {', '.join(near) or 'none'}")


def _check_heads(config: Any) -> None:
    """Attention heads that do not divide show up in the first forward pass only."""
    heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and keys and heads % keys:
        raise ValueError(f"num_key_value_heads = {keys} must divide num_attention_heads = {heads}")
    if heads and not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise ValueError(f"num_attention_heads = {heads} must divide hidden_size = {config.hidden_size}")


def _padded_vocabulary(tokenizer: Any) -> int:
    return -(-len(tokenizer) // 8) * 8


def _takes(model_class: type, argument: str) -> bool:
    return argument in inspect.signature(model_class).parameters


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def as_backbone_config(value: BackboneConfig | Mapping[str, Any] | str) -> BackboneConfig:
    """Accept a name, a mapping, or the dataclass itself."""
    if isinstance(value, BackboneConfig):
        return value
    return BackboneConfig(name=value) if isinstance(value, str) else BackboneConfig(**value)
