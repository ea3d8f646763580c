"""Operations by formula: the published table, and what PyTorch counts on the engine itself."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM

from peft_lightning.errors import UsageError
from peft_lightning.functional import flops
from peft_lightning.functional.flops import EncoderShape, forward_flops
from peft_lightning.layers.token_drop import TokenDrop

SIZES = {
    "base": {"layers": 12, "width": 768, "intermediate": 3072},
    "large": {"layers": 24, "width": 1024, "intermediate": 4096},
}
TINY = EncoderShape(layers=5, width=16, intermediate=40, vocabulary=48)


@pytest.mark.parametrize(
    ("size", "tokens", "masked", "vocabulary", "training", "drop"),
    [
        ("base", 128, True, 30522, 69.8, 0.764),
        ("base", 128, False, 30522, 85.5, 0.807),
        ("base", 512, True, 30522, 301, 0.755),
        ("base", 512, False, 50265, 410, 0.820),
        ("large", 128, True, 30522, 240, 0.755),
        ("large", 128, False, 30522, 262, 0.775),
        ("large", 512, True, 30522, 1020, 0.748),
        ("large", 512, False, 50265, 1166, 0.780),
    ],
)
def test_two_plain_passes(size: str, tokens: int, masked: bool, vocabulary: int, training: float, drop: float) -> None:
    shape, targets = EncoderShape(**SIZES[size], vocabulary=vocabulary), round(0.15 * tokens)
    plain: dict[str, Any] = {"sparse_last": False, "masked_head": masked}
    dense = forward_flops(shape, tokens, targets, **plain)
    dropping = forward_flops(shape, tokens, targets, tokens // 2, full=False, **plain)
    both = forward_flops(shape, tokens, targets, tokens // 2, share_prefix=False, **plain)
    assert 3 * dense / 1e9 == pytest.approx(training, rel=2e-3)
    assert round(dropping / dense, 3) == drop
    assert round(both / dense, 3) == pytest.approx(1 + drop)
    assert round((0.9 * dropping + 0.1 * both) / dense, 3) == pytest.approx(drop + 0.1)


@pytest.mark.parametrize(
    ("size", "two", "shared", "sparse", "dense_sparse", "against_sparse"),
    [
        ("base", (1.755, 0.855), (1.308, 0.810), (1.192, 0.747), 0.942, 0.793),
        ("large", (1.748, 0.848), (1.273, 0.801), (1.214, 0.768), 0.970, 0.791),
    ],
)
def test_exact_savings(
    size: str,
    two: tuple[float, float],
    shared: tuple[float, float],
    sparse: tuple[float, float],
    dense_sparse: float,
    against_sparse: float,
) -> None:
    shape, (tokens, targets, kept) = EncoderShape(**SIZES[size], vocabulary=30522), (512, 77, 256)
    dense = forward_flops(shape, tokens, targets, sparse_last=False)
    options: list[dict[str, Any]] = [{"share_prefix": False, "sparse_last": False}, {"sparse_last": False}, {}]
    for option, (step, cycle) in zip(options, (two, shared, sparse), strict=True):
        both = forward_flops(shape, tokens, targets, kept, **option)
        option.pop("share_prefix", None)
        dropping = forward_flops(shape, tokens, targets, kept, full=False, **option)
        mean = 0.9 * dropping + 0.1 * both
        assert (round(both / dense, 3), round(mean / dense, 3)) == (step, cycle)
    saved = forward_flops(shape, tokens, targets)
    assert round(saved / dense, 3) == dense_sparse
    assert round(mean / saved, 3) == against_sparse


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("sparse_last", [True, False])
@pytest.mark.parametrize(("kept", "full"), [(None, True), (8, False), (8, True)])
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_it_is_what_pytorch_counts(
    kind: str, kept: int | None, full: bool, sparse_last: bool, share_prefix: bool
) -> None:
    shape = EncoderShape(layers=5, width=16, intermediate=40, vocabulary=48, embedding=8 if kind == "electra" else 0)
    wide = {"embedding_size": 8} if kind == "electra" else {}
    config = AutoConfig.for_model(
        kind,
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=40,
        vocab_size=48,
        max_position_embeddings=24,
        **wide,
    )
    engine = TokenDrop(AutoModelForMaskedLM.from_config(config).eval())
    blocks, tokens, targets = 2, 24, 3
    ids, queries = torch.arange(blocks * tokens).view(blocks, tokens) % 48, torch.arange(targets).expand(blocks, -1)
    keep = None if kept is None else torch.arange(kept).expand(blocks, -1)
    # other kernels for attention are not counted on the CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        passes = engine(ids, queries, keep, full=full, share_prefix=share_prefix, sparse_last=sparse_last)
        for hidden in (passes.student, passes.teacher):
            if hidden is not None:
                engine.logits(hidden)
    expected = forward_flops(
        shape, tokens, targets, kept, full=full, share_prefix=share_prefix, sparse_last=sparse_last
    )
    assert counter.get_total_flops() == blocks * expected


def test_the_example() -> None:
    assert doctest.testmod(flops).attempted > 0
    assert doctest.testmod(flops).failed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, "targets = 0: must be from 1 to tokens = 24"),
        ({"kept": 25}, "kept = 25: must be from 1 to tokens = 24"),
        ({"full": False}, "at least one pass must run"),
        ({"masked_head": False}, "sparse_last = True: must be False where the head computes all positions"),
        ({"kept": 8, "shape": EncoderShape(layers=3, width=1, intermediate=1, vocabulary=1)}, "layers = 3: .*least 4"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        forward_flops(**{"shape": TINY, "tokens": 24, "targets": 3, **options})


def test_a_shape_has_no_empty_side() -> None:
    with pytest.raises(UsageError, match="intermediate = 0: must be at least 1"):
        EncoderShape(layers=4, width=8, intermediate=0, vocabulary=8)
