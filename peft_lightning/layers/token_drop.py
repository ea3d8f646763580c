"""A masked language model whose middle layers see a part of the tokens (Hou et al., 2022; SCTD, Zhong et al., 2023).

With l layers, numbered from 0, and h = l // 2:

    x = layers 0 .. h-2 (embeddings)                     all tokens
    y = layer h-1, queries x[keep], keys and values x    the kept look at all
    y = layers h .. l-2 (y)                              kept tokens only
    z = x, with y at ``keep``                            the dropped re-enter as they were
    last layer, queries z[q], keys and values z          only where something is predicted

The full pass (the teacher) runs all layers on all tokens. Up to layer h-1 both passes are the same computation, of
which the student takes the kept rows (``share_prefix``). The backbone's own submodules compute everything, so no model
code is replaced and its state dict does not change; they are called directly, since a layer's own ``forward`` cannot
take queries that are fewer than its keys.

Shapes: B blocks, S tokens, K kept, Q queries of the last layer, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peft_lightning.errors import UsageError
from peft_lightning.functional.tokens import gather_tokens, loss_sums, scatter_tokens

__all__ = ["Passes", "TokenDrop", "TokenImportance"]

_FEWEST_LAYERS = 4
# model_type -> the bare model, the transformation before the output layer, and the output layer
_PARTS = {
    "bert": ("bert", "cls.predictions.transform", "cls.predictions.decoder"),
    "roberta": ("roberta", "lm_head", "lm_head.decoder"),
    "electra": ("electra", "generator_predictions", "generator_lm_head"),
}


class Passes(NamedTuple):
    """Hidden states of the passes that ran; None for one that did not.

    Attributes:
        student: ``[B, Q, D]`` of the last layer at the queries, tokens dropped.
        teacher: the same of the full pass.
        student_before: ``[B, S, D]`` that enter the last layer of the dropping pass, dropped tokens as they re-enter.
        teacher_before: the same of the full pass.
        keep: int64 ``[B, K]`` positions of the kept tokens.
    """

    student: Tensor | None
    teacher: Tensor | None
    student_before: Tensor | None
    teacher_before: Tensor | None
    keep: Tensor | None

    def compared(self, choice: str, *, before: bool) -> tuple[Tensor, Tensor]:
        """States ``[B, n, D]`` of the full and of the dropping pass.

        Args:
            choice: all_hidden (as they are), kept_hidden (the kept tokens' before the last layer), or cls_hidden (the
                first token's, which after the last layer is the last query).
            before: whether before the last layer, or after it.
        """
        pair = (self.teacher_before, self.student_before) if before else (self.teacher, self.student)
        teacher, student = (cast(Tensor, x_BSD) for x_BSD in pair)
        if choice == "kept_hidden":
            keep_BK = cast(Tensor, self.keep)
            return gather_tokens(teacher, keep_BK), gather_tokens(student, keep_BK)
        if choice == "cls_hidden":
            place = 0 if before else -1
            return teacher[:, place].unsqueeze(1), student[:, place].unsqueeze(1)
        return teacher, student


class TokenDrop:
    """Drives a model of transformers with a masked-language-model head; has no parameters or state of its own.

    Args:
        model: ``AutoModelForMaskedLM`` of a known architecture.
        checkpointing: whether each layer is computed again in the backward pass.

    Raises:
        UsageError: if the architecture is not known, or has fewer than four layers.
    """

    def __init__(self, model: nn.Module, *, checkpointing: bool = False) -> None:
        config: Any = model.config
        if config.model_type not in _PARTS:
            raise UsageError(f"backbone of type {config.model_type!r}: pretraining knows {', '.join(_PARTS)}")
        if config.num_hidden_layers < _FEWEST_LAYERS:
            raise UsageError(f"num_hidden_layers = {config.num_hidden_layers}: token dropping needs {_FEWEST_LAYERS}")
        self.model = model
        self.checkpointing = checkpointing
        self._compute: Callable[..., Tensor] = _compute

    # -- parts of the model --------------------------------------------------------------------------------------

    @property
    def bare(self) -> Any:
        """The model without its head."""
        return self.model.get_submodule(_PARTS[self._type][0])

    @property
    def _type(self) -> str:
        config: Any = self.model.config
        return str(config.model_type)

    def through_methods(self) -> Iterator[tuple[nn.Module, str]]:
        """Compute each layer by a method of its own from now on, which others can wrap: layers and method's name."""
        self._compute = _by_method
        for layer in self.bare.encoder.layer:
            layer.compute = MethodType(_compute, layer)
            yield layer, "compute"

    def output_layer(self) -> tuple[Tensor, Tensor]:
        """Weight ``[V, E]`` and bias ``[V]`` that give the logits."""
        decoder: Any = self.model.get_submodule(_PARTS[self._type][2])
        return decoder.weight, decoder.bias

    def transform(self, hidden: Tensor) -> Tensor:
        """What comes between the last layer and the output layer."""
        head: Any = self.model.get_submodule(_PARTS[self._type][1])
        if self._type == "roberta":
            transformed: Tensor = head.layer_norm(F.gelu(head.dense(hidden)))
            return transformed
        transformed = head(hidden)
        return transformed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores ``[..., V]`` of all words from the last layer's states ``[..., D]``."""
        weight_VE, bias_V = self.output_layer()
        return F.linear(self.transform(hidden), weight_VE, bias_V)

    # -- the passes ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        ids_BS: Tensor,
        queries_BQ: Tensor,
        keep_BK: Tensor | None,
        *,
        full: bool = False,
        share_prefix: bool = True,
        sparse_last: bool = True,
        teacher_learns: bool = True,
        mask_BSS: Tensor | None = None,
    ) -> Passes:
        """Run the dropping pass (if ``keep_BK`` is given), the full pass (if ``full``), or both.

        Args:
            ids_BS: int64, no padding.
            queries_BQ: int64, positions where the last layer's output is wanted: those that are predicted.
            keep_BK: int64, ascending positions of the tokens that stay in the middle layers.
            full: whether the full pass runs.
            share_prefix: whether both passes share what they have in common.
            sparse_last: whether the last layer computes nothing but the queries.
            teacher_learns: whether gradients go into what only the full pass computes; else it keeps no activations.
            mask_BSS: bool, True where a token may look at another; None: everywhere.
        """
        layers: Sequence[Any] = self.bare.encoder.layer
        middle, last = len(layers) // 2, layers[-1]
        x_BSD = self._first(layers[: middle - 1], ids_BS, mask_BSS)
        student = teacher = z_BSD = t_BSD = None
        alone = torch.is_grad_enabled() and (teacher_learns or keep_BK is None)  # what only the full pass computes
        if full:
            shared = share_prefix or keep_BK is None
            with torch.set_grad_enabled(torch.is_grad_enabled() if shared else alone):
                start = x_BSD if shared else self._first(layers[: middle - 1], ids_BS, mask_BSS)
                t_BSD = self._layer(layers[middle - 1], start, start, mask_BSS)
        if keep_BK is not None:
            if t_BSD is not None and share_prefix:
                y_BKD = gather_tokens(t_BSD, keep_BK)
            else:
                queries = gather_tokens(x_BSD, keep_BK)
                y_BKD = self._layer(layers[middle - 1], queries, x_BSD, _rows(mask_BSS, keep_BK))
            kept_mask = _columns(_rows(mask_BSS, keep_BK), keep_BK)
            for layer in layers[middle:-1]:
                y_BKD = self._layer(layer, y_BKD, y_BKD, kept_mask)
            z_BSD = scatter_tokens(x_BSD, keep_BK, y_BKD)
            student = self._last(last, z_BSD, queries_BQ, mask_BSS, sparse_last)
        if t_BSD is not None:
            with torch.set_grad_enabled(alone):
                for layer in layers[middle:-1]:
                    t_BSD = self._layer(layer, t_BSD, t_BSD, mask_BSS)
                teacher = self._last(last, t_BSD, queries_BQ, mask_BSS, sparse_last)
        return Passes(student, teacher, z_BSD, t_BSD, keep_BK)

    def _first(self, layers: Sequence[Any], ids_BS: Tensor, mask_BSS: Tensor | None) -> Tensor:
        bare = self.bare
        x_BSD: Tensor = bare.embeddings(input_ids=ids_BS)
        if hasattr(bare, "embeddings_project"):
            x_BSD = bare.embeddings_project(x_BSD)
        for layer in layers:
            x_BSD = self._layer(layer, x_BSD, x_BSD, mask_BSS)
        return x_BSD

    def _last(self, layer: Any, x_BSD: Tensor, queries_BQ: Tensor, mask_BSS: Tensor | None, sparse: bool) -> Tensor:
        if sparse:
            return self._layer(layer, gather_tokens(x_BSD, queries_BQ), x_BSD, _rows(mask_BSS, queries_BQ))
        return gather_tokens(self._layer(layer, x_BSD, x_BSD, mask_BSS), queries_BQ)

    def _layer(self, layer: Any, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._compute, layer, queries, keys, mask, use_reentrant=False)
            return again
        return self._compute(layer, queries, keys, mask)


def _compute(layer: Any, queries_BQD: Tensor, keys_BSD: Tensor, mask_BQS: Tensor | None) -> Tensor:
    """One transformer layer of BERT's shape: ``[B, Q, D]`` over ``[B, S, D]`` -> ``[B, Q, D]``."""
    attention = layer.attention.self
    heads, size = attention.num_attention_heads, attention.attention_head_size

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, size)).transpose(1, 2)

    context = F.scaled_dot_product_attention(
        split(attention.query(queries_BQD)),
        split(attention.key(keys_BSD)),
        split(attention.value(keys_BSD)),
        attn_mask=None if mask_BQS is None else mask_BQS.unsqueeze(1),
        dropout_p=attention.dropout.p if attention.training else 0.0,
        scale=attention.scaling,
    )
    attended = layer.attention.output(context.transpose(1, 2).flatten(-2), queries_BQD)
    output: Tensor = layer.feed_forward_chunk(attended)
    return output


def _by_method(layer: Any, *tensors: Tensor | None) -> Tensor:
    computed: Tensor = layer.compute(*tensors)
    return computed


def _rows(mask_BSS: Tensor | None, positions_BQ: Tensor) -> Tensor | None:
    return None if mask_BSS is None else gather_tokens(mask_BSS, positions_BQ)


def _columns(mask_BQS: Tensor | None, positions_BK: Tensor) -> Tensor | None:
    if mask_BQS is None:
        return None
    return mask_BQS.gather(2, positions_BK.unsqueeze(1).expand(-1, mask_BQS.shape[1], -1))


class TokenImportance(nn.Module):
    """How much each word's prediction costs at present; which tokens stay is decided by it.

    Args:
        vocabulary: V.
        protected: ids that must stay.
        never: ids that must go.
        start: importance of a word that was no target yet; high, so that it stays until more is known.
    """

    def __init__(
        self, vocabulary: int, protected: Sequence[int] = (), never: Sequence[int] = (), start: float = 10.0
    ) -> None:
        super().__init__()
        self.table: Tensor
        self.decided: Tensor
        self.sums: Tensor
        self.register_buffer("table", torch.full((vocabulary,), start))
        decided = torch.zeros(vocabulary, dtype=torch.int8)
        decided[list(protected)] = 1
        decided[list(never)] = -1
        self.register_buffer("decided", decided)
        self.register_buffer("sums", torch.zeros(2, vocabulary), persistent=False)

    def scores(self, ids_BS: Tensor, *, random: bool = False) -> Tensor:
        """fp32 [B, S], infinite where it is decided; with ``random`` all other words count alike."""
        table = torch.zeros_like(self.table) if random else self.table
        table = table.masked_fill(self.decided > 0, torch.inf).masked_fill(self.decided < 0, -torch.inf)
        return table[ids_BS]

    def collect(self, ids_N: Tensor, losses_N: Tensor) -> None:
        """Remember what a batch cost; ids are the answers."""
        self.sums += loss_sums(ids_N, losses_N, len(self.table))

    def forget(self) -> None:
        """Drop what was collected since the last update."""
        self.sums.zero_()

    def update(self, beta: float, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the averages by what was collected on all ranks since the last time.

        Args:
            beta: share of the old average that stays.
            reduce: tensor -> its sum over all ranks.
        """
        total, count = reduce(self.sums).unbind()
        moved = beta * self.table + (1 - beta) * total / count.clamp_min(1)
        self.table.copy_(torch.where(count > 0, moved, self.table))
        self.forget()
