"""What each layer of a backbone knows of a sentence: linear probes (Conneau et al., 2018; SCTD, figures 4 and 8).

The backbone is frozen. Every layer's vectors of the sentences are computed in one pass and standardised on the
training split, mean 0 and deviation 1. On them a multinomial logistic regression (weights W, one row per class, and
biases b) minimises

    mean over the training split of CE(W x + b, y)  +  l2 / 2 |W|^2

whose strength l2 is chosen on the validation split (of equally good ones the strongest). What is reported is the
accuracy on the test split, with the interval that holds 95 % of it when the test sentences are drawn again, from
themselves. The same draws serve all backbones, so a gap between two of them has an interval of its own.

Shapes: N sentences, D width, C classes, l layers, R draws.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from peft_lightning.analysis.encoder import FrozenEncoder
from peft_lightning.analysis.sentences import Sentences

__all__ = ["LayerProbe", "fit_logistic", "gaps", "probe_backbone", "probe_layer"]

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
DRAWS = 1000
# A feature that moves less is rounding only; relative to its own size, and to the layer's.
_STILL = (1e-5, 1e-6)


class LayerProbe(NamedTuple):
    """What one layer gave.

    Attributes:
        accuracy: on the test split.
        validation: accuracy on the validation split.
        l2: the strength that was chosen.
        right: bool [N], which test sentences it got right.
    """

    accuracy: float
    validation: float
    l2: float
    right: Tensor


def fit_logistic(x_ND: Tensor, labels_N: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """The regression above, by L-BFGS.

    Args:
        x_ND: standardised features.
        labels_N: int64.
        classes: C.
        l2: at least 0.
        start: where to begin; zeros by default.

    Returns:
        ``[C, D + 1]`` of the features' dtype, the biases last.
    """
    weights = torch.zeros(classes, x_ND.shape[1] + 1, dtype=x_ND.dtype, device=x_ND.device)
    weights = (weights if start is None else start.clone()).requires_grad_()
    search = torch.optim.LBFGS(
        [weights],
        max_iter=300,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(_scores(x_ND, weights), labels_N) + l2 / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(objective)
    return weights.detach()


def probe_layer(features: dict[str, Tensor], labels: dict[str, Tensor], classes: int) -> LayerProbe:
    """Standardise, fit once per strength, choose, and measure.

    Args:
        features: split (tr, va, te) -> fp32 [N, D].
        labels: split -> int64 [N].
        classes: C.
    """
    mean_D, deviation_D = features["tr"].mean(dim=0), features["tr"].std(dim=0, correction=0)
    least_D = _STILL[0] * mean_D.abs() + _STILL[1] * features["tr"].square().mean().sqrt()
    scale_D = torch.where(deviation_D > least_D, deviation_D, torch.inf)
    x = {split: (part - mean_D) / scale_D for split, part in features.items()}
    best: tuple[float, float, Tensor] | None = None
    weights: Tensor | None = None
    for l2 in STRENGTHS:
        weights = fit_logistic(x["tr"], labels["tr"], classes, l2, weights)
        validation = _right(x["va"], weights, labels["va"]).double().mean().item()
        if best is None or validation > best[0]:
            best = validation, l2, weights
    assert best is not None
    right_N = _right(x["te"], best[2], labels["te"]).cpu()
    return LayerProbe(right_N.double().mean().item(), best[0], best[1], right_N)


def probe_backbone(
    encoder: FrozenEncoder, task: Sentences, *, pooling: str, seed: int
) -> tuple[dict[str, Any], Tensor]:
    """Probe the embeddings and every layer of a backbone.

    Vectors go through files in the temporary folder, one per layer: N x D floats each, and one layer in memory.

    Args:
        encoder: the backbone.
        task: the sentences.
        pooling: mean or first.
        seed: of the draws.

    Returns:
        ``accuracy``, its interval ``low`` and ``high``, ``validation`` (accuracy) and ``l2``, a list over the layers
        each; and the accuracy in every draw, fp64 [R, l + 1].
    """
    splits = ("tr", "va", "te")
    texts = [text for split in splits for text in task.texts[split]]
    sizes = [len(task.texts[split]) for split in splits]
    labels = {split: torch.tensor(task.labels[split], device=encoder.device) for split in splits}
    with tempfile.TemporaryDirectory(prefix="probe_") as folder:
        order, files = _write_layers(encoder, texts, pooling, Path(folder))
        probes = []
        for file in files:
            vectors_ND = torch.from_numpy(np.fromfile(file, np.float32).reshape(len(texts), -1))[order]
            parts = vectors_ND.to(encoder.device).split(sizes)
            probes.append(probe_layer(dict(zip(splits, parts, strict=True)), labels, len(task.classes)))
            file.unlink()
    draws_RL = _draws(torch.stack([probe.right for probe in probes]), seed)
    low_L, high_L = _interval(draws_RL)
    return {
        "accuracy": [probe.accuracy for probe in probes],
        "low": low_L,
        "high": high_L,
        "validation": [probe.validation for probe in probes],
        "l2": [probe.l2 for probe in probes],
    }, draws_RL


def gaps(draws_RL: Tensor, others_RL: Tensor) -> dict[str, list[float]]:
    """The interval of the difference between two backbones of equal depth, layer by layer: first less second."""
    low_L, high_L = _interval(draws_RL - others_RL)
    return {"low": low_L, "high": high_L}


def _write_layers(
    encoder: FrozenEncoder, texts: Sequence[str], pooling: str, folder: Path
) -> tuple[Tensor, list[Path]]:
    """One file per layer, rows as they come; and where the row of each text is."""
    come: list[int] = []
    files: list[Any] = []
    try:
        for numbers, vectors_LND in encoder.layers(texts, pooling):
            come += numbers
            files = files or [open(folder / f"{number}.f32", "wb") for number in range(len(vectors_LND))]
            for file, vectors_ND in zip(files, vectors_LND, strict=True):
                file.write(vectors_ND.numpy().tobytes())
    finally:
        for file in files:
            file.close()
    return torch.tensor(come).argsort(), [Path(file.name) for file in files]


def _scores(x_ND: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1], x_ND, weights[:, :-1].T)


def _right(x_ND: Tensor, weights: Tensor, labels_N: Tensor) -> Tensor:
    return _scores(x_ND, weights).argmax(dim=1) == labels_N


def _draws(right_LN: Tensor, seed: int) -> Tensor:
    """Accuracies when the sentences are drawn with replacement, fp64 [R, l + 1]."""
    size = right_LN.shape[1]
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(DRAWS):
        counts_N = torch.from_numpy(np.bincount(generator.integers(size, size=size), minlength=size))
        rows.append(right_LN.double() @ counts_N.double() / size)
    return torch.stack(rows)


def _interval(draws_RL: Tensor) -> tuple[list[float], list[float]]:
    low_L, high_L = draws_RL.quantile(torch.tensor([0.025, 0.975], dtype=draws_RL.dtype), dim=0)
    return low_L.tolist(), high_L.tolist()
