"""Backbones: any encoder of transformers, from a folder, a hub name, or a configuration with random weights."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from peft_lightning.backbones.folders import check_folder, check_left_over, check_sizes
from peft_lightning.backbones.options import PRUNED_FILE, check_options, pruned_folder
from peft_lightning.backbones.quiet import quiet
from peft_lightning.backbones.sharing import shared
from peft_lightning.backbones.tokenizers import load_tokenizer
from peft_lightning.checks import check_types
from peft_lightning.errors import UsageError, first_line

__all__ = ["BackboneConfig", "as_backbone_config", "build_backbone", "build_masked_lm", "fingerprint"]

# What transformers raises for a folder or a configuration that it cannot use.
_REFUSED: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError)
_REFUSED += (AttributeError, ArithmeticError, IndexError, ImportError, MemoryError, RecursionError)
_REFUSED += (SafetensorError, StrictDataclassError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which encoder, and how it is held.

    Attributes:
        name: local folder or hub name of pretrained weights.
        config: instead of ``name``: ``model_type`` and options of a transformers configuration, for random weights.
        tokenizer: folder, hub name, or ``toy``; by default the backbone's own. A backbone made from ``config`` has
            none; in pretraining it is then the corpus's.
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

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's folder, hub name (with ``@revision`` where the backbone has one), or ``toy``.

        Raises:
            UsageError: if none is given for a backbone made from ``config``.
        """
        name = self.tokenizer_of(self.name, self.tokenizer, self.revision)
        if name is None:
            raise UsageError("backbone.tokenizer: a backbone made from config needs one (a folder, a hub name, or toy)")
        return name

    @staticmethod
    def tokenizer_of(name: str | None, tokenizer: str | None, revision: str | None) -> str | None:
        """The tokenizer that goes with a backbone: the one named, or the backbone's own at the same revision."""
        return tokenizer or (f"{name}@{revision}" if name and revision else name)


def build_backbone(config: BackboneConfig) -> nn.Module:
    """Build the bare encoder (no pooler, no head) in training mode with all weights frozen or not as they come.

    Random weights use the current random state; the caller seeds it.

    Raises:
        UsageError: if the folder or name cannot be loaded, or the configuration is not accepted.
    """
    bare = replace(config, gradient_checkpointing=False, compile=False)
    backbone = shared(repr(bare), lambda: _bare(bare))
    if config.gradient_checkpointing:
        # renamed in transformers 5.23
        enable: Any = getattr(backbone, "activation_checkpointing_enable", None)
        (enable or cast(Any, backbone).gradient_checkpointing_enable)({"use_reentrant": False})
    if config.compile:
        backbone.compile()
    return backbone.train()


def _bare(config: BackboneConfig) -> nn.Module:
    """The encoder as it comes from its file, or from the random state."""
    from transformers import AutoModel

    backbone, lacking = _build(config, AutoModel, None)
    _refuse_lacking(config, lacking)
    return backbone


def build_masked_lm(config: BackboneConfig, tokenizer: Any = None, *, new_head: bool = True) -> nn.Module:
    """Build an encoder with its head for masked language modelling, in training mode.

    The settings ``compile`` and ``gradient_checkpointing`` are left to whoever drives its layers.

    Args:
        config: which; a folder without the head (or with a part of it) gets a new one, with a warning.
        tokenizer: decides, where ``config.config`` does not, the vocabulary's size (rounded up to a multiple of 64) and
            the numbers of special tokens.
        new_head: whether a folder without the head gets a new one.

    Raises:
        UsageError: if it cannot be loaded or built, its architecture or, without ``new_head``, its folder has no such
            head, or its padding is another word of the tokenizer.
    """
    from transformers import AutoModelForMaskedLM

    model, lacking = _build(config, AutoModelForMaskedLM, tokenizer)
    padding, ours = cast(Any, model.config).pad_token_id, getattr(tokenizer, "pad_token_id", None)
    if padding is not None and ours is not None and padding != ours:
        word = tokenizer.convert_ids_to_tokens(padding)
        raise UsageError(f"backbone: takes token {padding} for padding, {word!r} in the tokenizer, whose own is {ours}")
    prefix = f"{model.base_model_prefix}."
    _refuse_lacking(config, [name for name in lacking if name.startswith(prefix)])
    if lacking and not new_head:
        what = f"its weights lack {len(lacking)} tensors of the head for masked language modelling: {lacking[0]}"
        raise UsageError(f"backbone.name = {config.name!r}: cannot be read out with words ({what})")
    if lacking:
        warnings.warn(
            f"{config.name}: has no head for masked language modelling ({len(lacking)} tensors lack); a new one begins "
            "with random weights",
            stacklevel=2,
        )
    return model.train()


def _build(config: BackboneConfig, auto: Any, tokenizer: Any) -> tuple[nn.Module, list[str]]:
    """A model of an ``Auto...`` class, and the names of the tensors that its file lacks."""
    from transformers import AutoConfig

    try:
        if (reason := pruned_folder(config.name)) is not None:
            raise ValueError(reason)
        if config.config is not None:
            options = dict(config.config)
            check_options(options)
            check_sizes(options)
            if "vocab_size" not in options:
                options["vocab_size"] = _vocabulary(config, tokenizer)
            numbers = _special_numbers(tokenizer) or _roles(config)
            hf_config = AutoConfig.for_model(**{**numbers, **options})
        else:
            check_folder(config.name)
            hf_config = AutoConfig.from_pretrained(config.name, revision=config.revision, trust_remote_code=False)
        _check_heads(hf_config)
        model_class = auto._model_mapping[type(hf_config)]
        extra = {"add_pooling_layer": False} if _takes(model_class, "add_pooling_layer") else {}
        if getattr(hf_config, "use_cache", False):  # keys and values of earlier tokens serve generation only
            hf_config.use_cache = False
        if config.attention != "auto":
            hf_config._attn_implementation = config.attention
        if config.config is not None:
            return _held_in(model_class(hf_config, **extra), DTYPES[config.dtype]), []
        with quiet():
            model, loading = model_class.from_pretrained(
                config.name,
                config=hf_config,
                revision=config.revision,
                dtype=DTYPES[config.dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here, by name
                **extra,
            )
        _check_shapes(loading["mismatched_keys"])
        check_left_over(loading["unexpected_keys"], model.state_dict(), model.base_model_prefix)
        if odd := [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]:
            raise ValueError(f"{odd[0]} has values that are not finite")
        return model, sorted(loading["missing_keys"])
    except _REFUSED as error:
        what = f"backbone.name = {config.name!r}" if config.name else f"backbone.config = {config.config}"
        raise UsageError(f"{what}: cannot be built ({first_line(error)})") from error


def _held_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters in a dtype; buffers stay, as they do in a pretrained model (rotary frequencies lose by rounding)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _check_shapes(mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Tensors of another shape than the configuration says are most often a pruned model's."""
    if differing := sorted(mismatched, key=lambda entry: entry[0]):
        name, given, wanted = differing[0]
        raise ValueError(
            f"{len(differing)} tensors are not of the shape that its config.json says, as {name}, {tuple(given)} and "
            f"not {tuple(wanted)}: perhaps a pruned model that was saved again without {PRUNED_FILE}; begin with the "
            "whole backbone"
        )


def _refuse_lacking(config: BackboneConfig, names: list[str]) -> None:
    if names:
        what = f"its weights lack {len(names)} tensors of the encoder: {', '.join(names[:3])}"
        raise UsageError(f"backbone.name = {config.name!r}: cannot be built ({what})")


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


def _check_heads(config: Any) -> None:
    """Attention heads that do not divide show up in the first forward pass only."""
    heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and keys and heads % keys:
        raise ValueError(f"num_key_value_heads = {keys} must divide num_attention_heads = {heads}")
    if heads and not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise ValueError(f"num_attention_heads = {heads} must divide hidden_size = {config.hidden_size}")


def _vocabulary(config: BackboneConfig, tokenizer: Any) -> int:
    """A size that keeps matrix products aligned."""
    if tokenizer is None:
        return -(-len(load_tokenizer(config.tokenizer_name)) // 8) * 8
    return -(-len(tokenizer) // 64) * 64


def _special_numbers(tokenizer: Any) -> dict[str, int]:
    """What a configuration says of special tokens: padding, which has no position of its own in RoBERTa, and ends."""
    names = {"pad_token_id": "pad_token_id", "bos_token_id": "cls_token_id", "eos_token_id": "sep_token_id"}
    found = {name: getattr(tokenizer, ours, None) for name, ours in names.items()}
    return {name: number for name, number in found.items() if number is not None}


def _roles(config: BackboneConfig) -> dict[str, int]:
    """What the configuration of a model that writes says of special tokens, where each starts and stops.

    The numbers are the tokenizer's; which of them starts a text, and which ends it, is as in the plain configuration.
    """
    from transformers import AutoConfig

    plain = AutoConfig.for_model(cast(dict[str, Any], config.config)["model_type"])
    if config.tokenizer is None or not plain.is_encoder_decoder:
        return {}
    ours = _special_numbers(load_tokenizer(config.tokenizer))
    numbers = {getattr(plain, name): number for name, number in ours.items()}
    names = (*ours, "decoder_start_token_id", "forced_eos_token_id")
    return {name: numbers[number] for name in names if (number := getattr(plain, name, None)) in numbers}


def _takes(model_class: type, argument: str) -> bool:
    return argument in inspect.signature(model_class).parameters


def as_backbone_config(value: BackboneConfig | Mapping[str, Any] | str) -> BackboneConfig:
    """Accept a name, a mapping, or the dataclass itself."""
    if isinstance(value, BackboneConfig):
        return value
    return BackboneConfig(name=value) if isinstance(value, str) else BackboneConfig(**value)
