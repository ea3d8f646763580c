"""What the benchmark of further kinds of task trains: dense and sparse adapters, a task of each kind.

A recipe fits a small encoder into ten minutes on two CPU cores. SQuAD has SparseAdapter's bottleneck for it (256, its
table 2) and windows of 384 tokens. The model of XSum is a small random BART, with adapters in encoder, decoder and
cross-attention and the table's bottleneck of 512. A random frozen model has no language: its run shows that documents,
search and scorer work together, and ``toy_copy`` that the same model learns to write what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.runs import Trial
from benchmarks.shared import backbone
from benchmarks.sparse_arms import Arm, Suite
from peft_lightning import AdapterConfig, BackboneConfig, OptimConfig, PruneConfig

__all__ = ["SUITES"]

_BART = {
    "model_type": "bart",
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
}


def _bart(tiny: bool, dtype: str) -> BackboneConfig:
    """An encoder-decoder with the words of the benchmarks' encoder."""
    return BackboneConfig(config=_BART, tokenizer="toy" if tiny else backbone(False).name)


def _toy_bart(tiny: bool, dtype: str) -> BackboneConfig:
    return _bart(True, dtype)


def _suite(
    task: str,
    trial: Trial,
    seeds: int = 1,
    make: Callable[[bool, str], BackboneConfig] = backbone,
    **options: Any,
) -> Suite:
    adapter = AdapterConfig(**options)
    dense, sparse = PruneConfig(sparsity=0.0), PruneConfig(sparsity=0.4, score="snip")
    return Suite(
        name=task,
        arms=(
            Arm(name="dense", title="dense adapters", adapter=adapter, prune=dense),
            Arm(name="snip40", title="40 % removed by SNIP", adapter=adapter, prune=sparse),
        ),
        tasks=(task,),
        seeds=tuple(range(seeds)),
        optim=OptimConfig(lr=1e-3, warmup=0.1),
        trial=trial,
        dtype="bfloat16" if make is backbone else "float32",
        make=make,
    )


_CROSS: dict[str, Any] = {"bottleneck": 512, "cross": True}

SUITES = (
    _suite("squad_v1", Trial(epochs=2, checks=0, max_length=384), bottleneck=256),
    _suite("conll2003", Trial(epochs=5)),
    _suite("copa", Trial(epochs=20, batch_size=16), seeds=5),
    _suite("boolq", Trial(epochs=5, checks=0, max_length=256)),
    _suite("xsum", Trial(epochs=1, batch_size=16, max_length=256), make=_bart, **_CROSS),
    _suite("toy_copy", Trial(epochs=20, checks=0, batch_size=16, max_length=32), make=_toy_bart, **_CROSS),
)
