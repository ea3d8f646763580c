"""Writing with a bare encoder-decoder: its language-model head, and the search for the likeliest text.

    logits = h E^T

Symbols: ``h`` = the decoder's states, ``E`` [V, H] = the embedding of its inputs. BART (arXiv:1910.13461) ties the two,
so the head has no weights of its own. transformers adds a constant ``final_logits_bias`` there for a relative of BART
(Marian); BART's own files hold zeros or nothing (huggingface/transformers, issues 4567 and 4735), and a file with
anything else is refused. Shapes: B texts, T target tokens, V words, H width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lightning.errors import UsageError

__all__ = ["LanguageHead", "Writer"]

_TIED = ("bart",)  # architectures whose logits are the formula above
_BIAS = "final_logits_bias"


class LanguageHead(nn.Module):
    """Logits of the next token, by the embedding of a backbone.

    The backbone is looked up in every pass and never registered: the head has an empty ``state_dict``, follows moves
    and new weights, and trains exactly where the backbone's embedding does.

    Args:
        backbone: a bare encoder-decoder of transformers.

    Raises:
        UsageError: it is none, or one whose head is another.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        _refuse(cast(Any, backbone.config))
        _refuse_bias(cast(Any, backbone.config))
        self._unregistered = (backbone,)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits [B, T, V] for ``states`` [B, T, H], in the embedding's dtype or that of autocast."""
        weight_VH: Tensor = cast(Any, self._unregistered[0]).get_input_embeddings().weight
        return F.linear(states.to(weight_VH.dtype), weight_VH)


class Writer:
    """Beam search of transformers over a backbone as it stands: adapters, masks and hooks act in every step.

    The search belongs to a class that builds a backbone of its own. That one is built without memory (on the meta
    device) and replaced, so that nothing is copied. Keys and values of earlier tokens are kept: every adapter that
    an encoder-decoder takes here computes token by token. They are not where an attention has lost all its heads:
    transformers counts positions by what is kept. Evaluation mode is up to the caller.

    Args:
        backbone: a bare encoder-decoder.
        head: gives its logits.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        from transformers import AutoModelForSeq2SeqLM

        config = copy.deepcopy(cast(Any, backbone.config))
        model_class: Any = cast(Any, AutoModelForSeq2SeqLM)._model_mapping[type(config)]
        with torch.inference_mode(False):  # what is made here may be copied and used outside of it
            with torch.device("meta"):
                self._shell: Any = model_class(config)
            setattr(self._shell, _BIAS, torch.zeros(1, 1, device=next(backbone.parameters()).device))
        setattr(self._shell, self._shell.base_model_prefix, backbone)
        self._shell.lm_head = head
        self.backbone, self.head = backbone, head

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        *,
        longest: int,
        shortest: int = 0,
        beams: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram: int = 0,
        use_cache: bool = True,
    ) -> list[list[int]]:
        """Return the tokens written for each text, without start, end and padding.

        Args:
            inputs: ``input_ids`` and ``attention_mask``, [B, L].
            longest: tokens at most, with the end token.
            shortest: tokens at least before the end token.
            beams: kept at each step; 1 takes the likeliest token each time. The search ends when as many texts have.
            length_penalty: a text's score is its log-likelihood over its length to this power.
            no_repeat_ngram: no sequence of so many tokens is written twice; 0 allows all.
            use_cache: whether to keep keys and values; slower without, and the same.
        """
        from transformers import GenerationConfig

        config = self._shell.config
        whole = all(getattr(module, "num_heads", 1) for module in self.backbone.modules())
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        several = {"length_penalty": float(length_penalty), "early_stopping": True} if beams > 1 else {}
        settings = GenerationConfig(
            max_new_tokens=longest,
            min_new_tokens=shortest or None,
            num_beams=beams,
            do_sample=False,
            no_repeat_ngram_size=no_repeat_ngram or None,
            use_cache=use_cache and whole,
            bos_token_id=config.bos_token_id,
            eos_token_id=ends,
            pad_token_id=config.pad_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
            **several,
        )
        self._shell.generation_config = settings  # or it takes what a pretrained configuration says of searching
        with _uncompiled(self.backbone):
            written_BT = self._shell.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
            )
        return [_until(row, ends) for row in written_BT[:, 1:].tolist()]


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


@contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """Without ``compile()``: each step has another length and would be compiled anew."""
    compiled = vars(module).pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if compiled is not None:
            module._compiled_call_impl = compiled


def _refuse(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    name = config.model_type
    if name in _TIED and config.is_encoder_decoder and config.tie_word_embeddings:
        return
    if name in _TIED and config.is_encoder_decoder:
        reason = "its tie_word_embeddings is false, and a bare model has no head of its own"
    elif config.is_encoder_decoder:
        reason = f"it is an encoder-decoder, but the head is known of {', '.join(_TIED)} only"
    elif name in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        reason = "an encoder alone cannot write"
    else:
        reason = "a decoder alone would read text and summary as one sequence, which are two here"
    raise UsageError(f"backbone of type {name!r}: writing needs an encoder-decoder ({', '.join(_TIED)}); {reason}")


def _refuse_bias(config: Any) -> None:
    """Look into the file that the backbone came from, where it is one of safetensors: a bare model drops the bias."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    if not config._name_or_path:
        return
    options = {"local_files_only": True, "revision": getattr(config, "_commit_hash", None)}
    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    path = cached_file(config._name_or_path, "model.safetensors", **options, **missing)
    if path is None:
        return
    with safe_open(path, framework="pt") as file:
        if _BIAS in file.keys() and file.get_tensor(_BIAS).any():
            raise UsageError(f"backbone.name = {config._name_or_path!r}: its {_BIAS} is not zero, as BART's is")
