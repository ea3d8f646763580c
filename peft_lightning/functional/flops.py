"""What a pass of an encoder with a head for masked words costs, in floating-point operations, from its shape alone.

A multiply and an add are two operations. Matrix products are counted, and nothing else: embeddings, norms, softmax
and activations are a few per cent at most and do not depend on how a pass is cut. With Q queries over N keys a
layer of width D and intermediate size I costs

    2 Q D D (queries) + 4 N D D (keys, values) + 4 Q N D (scores, context) + 2 Q D D (output) + 4 Q D I (feed-forward)

and the head costs 2 P D E + 2 P E V at P positions, where E is the width of the embeddings. A training step costs
three times its forward pass: the backward pass has two products for every one of the forward pass.

Shapes: S tokens of a block, K of them kept, P predicted, D width, V vocabulary, l layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_lightning.errors import UsageError

__all__ = ["EncoderShape", "forward_flops"]

_FEWEST_LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The numbers that decide the cost.

    Attributes:
        layers: l.
        width: D.
        intermediate: width inside the feed-forward block.
        vocabulary: V, rows of the output layer.
        embedding: width of the embeddings and of the output layer; where it is not ``width`` (ELECTRA), a product
            leads from it to ``width`` at the bottom. 0 stands for ``width``.

    Raises:
        UsageError: if a number is below 1 (``embedding``: below 0).
    """

    layers: int
    width: int
    intermediate: int
    vocabulary: int
    embedding: int = 0

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("width", 1), ("intermediate", 1), ("vocabulary", 1), ("embedding", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} = {getattr(self, name)}: must be at least {least}")


def forward_flops(
    shape: EncoderShape,
    tokens: int,
    targets: int,
    kept: int | None = None,
    *,
    full: bool = True,
    share_prefix: bool = True,
    sparse_last: bool = True,
    masked_head: bool = True,
) -> int:
    """Operations of the forward pass, or of both passes, per block.

    Args:
        shape: of the model.
        tokens: S.
        targets: P.
        kept: K of the dropping pass, or None where it does not run.
        full: whether the full pass runs.
        share_prefix: whether two passes compute what they have in common once.
        sparse_last: whether the last layer computes nothing but the targets.
        masked_head: whether the head computes the targets only, or all positions.

    Returns:
        Operations; for BERT-base, a block of 128 tokens and 19 targets:

    >>> base = EncoderShape(layers=12, width=768, intermediate=3072, vocabulary=30522)
    >>> full = forward_flops(base, 128, 19, sparse_last=False)
    >>> f"{full / 1e9:.1f} G, {forward_flops(base, 128, 19, 64, full=False, sparse_last=False) / full:.3f} dropping"
    '23.3 G, 0.764 dropping'

    Raises:
        UsageError: if no pass runs, a number does not fit, or the head needs positions that the last layer leaves out.
    """
    _check(shape, tokens, targets, kept, full, sparse_last, masked_head)
    embedding = shape.embedding or shape.width
    entrance = 2 * tokens * shape.width * embedding if embedding != shape.width else 0
    whole = _layer(shape, tokens, tokens)
    heads = targets if masked_head else tokens
    end = _layer(shape, targets if sparse_last else tokens, tokens)
    end += 2 * heads * embedding * (shape.width + shape.vocabulary)
    middle = shape.layers // 2
    first = entrance + (middle - 1) * whole  # layers 0 .. l/2 - 2, the same in both passes
    flops = 0
    if full:
        flops += first + (shape.layers - middle) * whole + end
    if kept is not None:
        flops += (shape.layers - 1 - middle) * _layer(shape, kept, kept) + end
        if not (full and share_prefix):  # otherwise its rows are among those of the full pass
            flops += first + _layer(shape, kept, tokens)
    return flops


def _layer(shape: EncoderShape, queries: int, keys: int) -> int:
    squares = (4 * queries + 4 * keys) * shape.width**2
    return squares + 4 * queries * keys * shape.width + 4 * queries * shape.width * shape.intermediate


def _check(
    shape: EncoderShape, tokens: int, targets: int, kept: int | None, full: bool, sparse_last: bool, masked_head: bool
) -> None:
    for name, value in (("targets", targets), *((("kept", kept),) if kept is not None else ())):
        if not 1 <= value <= tokens:
            raise UsageError(f"{name} = {value}: must be from 1 to tokens = {tokens}")
    if kept is None and not full:
        raise UsageError("kept = None, full = False: at least one pass must run")
    if kept is not None and shape.layers < _FEWEST_LAYERS:
        raise UsageError(f"layers = {shape.layers}: token dropping needs at least {_FEWEST_LAYERS}")
    if sparse_last and not masked_head:
        raise UsageError("sparse_last = True: must be False where the head computes all positions")
